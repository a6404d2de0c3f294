"""Named inputs of multi-scale deformable attention for tests, benchmarks and documentation."""

from dataclasses import dataclass
from typing import Any

import torch

from .._case import Draw, LevelsCase, check_shape, levelled
from .._shape import times

OPERATOR = "ms_deform_attn"


@dataclass(frozen=True)
class Case(LevelsCase):
    """The sizes of one call; :meth:`arguments` creates its tensors.

    With ``near`` the points have this standard deviation around the query's pixel, in pixels of the sampled level;
    query q has position q of ``value``.
    """

    near: float | None = None

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        return {
            "value": draw.normal(self.batch, self.positions, self.heads, self.channels),
            "spatial_shapes": self.spatial_shapes,
            "sampling_locations": self.locations(draw),
            "attention_weights": draw.normal(self.batch, self.queries, self.heads, sum(self.points)).softmax(-1),
            "num_points": list(self.points),
            "mode": self.mode,
        }

    def pixels(self, draw: Draw, count: int, extent: torch.Tensor) -> torch.Tensor:
        """``count`` points for each query and head in pixels of a level of the size ``extent``."""
        if self.near is None:
            return super().pixels(draw, count, extent)
        moved = self.near * draw.normal(self.batch, self.queries, self.heads, count, self.axes)
        return self._centres()[:, None, None] * extent - 0.5 + moved

    def _centres(self) -> torch.Tensor:
        """``[Q, N]``: the centre of each query's pixel, 0 to 1 over the map, in tensor-axis order."""
        levels = []
        for size in self.sizes:
            axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size]
            levels.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2))
        return torch.cat(levels)[: self.queries]


FROM_SHAPE = ("name", "batch", "heads", "channels")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the value ``[B, S, H, D]`` of levels ``sizes``; by default 300 queries have 4 points a level."""
    check_shape(shape, "[B, S, H, D]")
    batch, length, heads, channels = shape
    settings = levelled({"queries": 300, "points": 4, "reach": 0.0, **settings}, length)
    return Case(times(shape), batch, heads=heads, channels=channels, **settings)


CASES = [
    Case("1d", 2, ((7,), (4,)), 3, 2, 3, (2, 2)),
    Case("1d-one-level", 1, ((9,),), 5, 1, 16, (3,)),
    Case("1d-uneven", 2, ((8,), (1,), (5,)), 4, 3, 5, (3, 1, 2)),
    Case("1d-nearest", 3, ((6,), (3,)), 5, 2, 4, (2, 1), mode="nearest"),
    Case("2d", 2, ((4, 5), (2, 3)), 3, 2, 3, (2, 2)),
    Case("2d-uneven", 1, ((5, 6), (3, 3), (1, 2)), 7, 3, 16, (4, 1, 2)),
    Case("2d-nearest", 2, ((5, 4), (2, 2)), 6, 2, 5, (1, 3), mode="nearest"),
    Case("2d-one-query", 3, ((3, 7), (1, 1)), 1, 1, 32, (2, 3)),
    Case("2d-one-channel", 1, ((1, 9), (6, 1)), 11, 4, 1, (2, 2)),
    Case("2d-level-without-points", 2, ((4, 4), (2, 2), (3, 3)), 5, 2, 8, (2, 0, 1)),
    Case("2d-encoder", 1, ((6, 7), (3, 4)), 54, 4, 8, (2, 2), near=2.0),
    Case("3d", 1, ((3, 4, 5), (2, 2, 2)), 3, 2, 3, (2, 2)),
    Case("3d-uneven", 2, ((2, 3, 4), (1, 1, 1)), 5, 1, 17, (3, 1)),
    Case("3d-nearest", 1, ((3, 2, 4), (2, 1, 2)), 6, 3, 4, (1, 2), mode="nearest"),
]

_PYRAMID = ((64, 64), (32, 32), (16, 16), (8, 8))
_DETECTION = ((100, 134), (50, 67), (25, 34), (13, 17))
_LARGE = ((128, 352), (64, 176), (32, 88), (16, 44))

BENCHMARKS = [
    Case("2d decoder", 1, _PYRAMID, 300, 8, 32, (4, 4, 4, 4), reach=0.0),
    Case("2d encoder", 1, _PYRAMID, 5440, 8, 32, (4, 4, 4, 4), near=2.0),
    Case("2d encoder, detection", 1, _DETECTION, 17821, 8, 32, (4, 4, 4, 4), near=2.0),
    Case("2d large maps", 1, _LARGE, 3600, 8, 32, (8, 8, 8, 8), reach=0.0),
    Case("3d", 1, ((16, 32, 32), (8, 16, 16)), 2560, 4, 16, (4, 4), reach=0.0),
    Case("1d", 1, ((2048,), (1024,), (512,), (256,)), 2048, 8, 32, (4, 4, 4, 4), reach=0.0),
]
