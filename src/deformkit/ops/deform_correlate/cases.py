"""Named inputs of deformable correlation for tests, benchmarks and documentation."""

from dataclasses import dataclass
from typing import Any

from .._case import Draw, LevelsCase, check_shape, levelled
from .._shape import times

OPERATOR = "deform_correlate"


@dataclass(frozen=True)
class Case(LevelsCase):
    """The sizes of one call; :meth:`arguments` creates its tensors."""

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        locations = self.locations(draw)
        return {
            "query": draw.normal(self.batch, self.queries, self.heads * self.channels) / self.channels**0.5,
            "key": draw.normal(self.batch, self.positions, self.heads, self.channels),
            "spatial_shapes": self.spatial_shapes,
            "sampling_locations": locations,
            "num_points": list(self.points),
            "mode": self.mode,
        }


FROM_SHAPE = ("name", "batch", "heads", "channels", "queries")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the query ``[B, Q, H, D]`` and levels of ``sizes``; by default it has 9 points a level."""
    check_shape(shape, "[B, Q, H, D]")
    batch, queries, heads, channels = shape
    settings = levelled({"points": 9, "reach": 0.0, **settings})
    return Case(times(shape), batch, queries=queries, heads=heads, channels=channels, **settings)


CASES = [
    Case("1d", 2, ((7,), (4,)), 3, 2, 3, (2, 2)),
    Case("1d-nearest", 3, ((6,), (3,)), 5, 2, 4, (2, 1), mode="nearest"),
    Case("2d", 2, ((4, 5), (2, 3)), 3, 2, 3, (2, 2)),
    Case("2d-uneven", 1, ((5, 6), (3, 3), (1, 2)), 7, 8, 16, (4, 0, 2)),
    Case("2d-one-level", 2, ((4, 5),), 6, 2, 9, (4,)),
    Case("2d-one-channel", 1, ((1, 9), (6, 1)), 11, 4, 1, (2, 2)),
    Case("3d", 1, ((3, 4, 5), (2, 2, 2)), 3, 2, 3, (2, 2)),
    Case("3d-nearest", 1, ((3, 2, 4), (2, 1, 2)), 6, 3, 4, (1, 2), mode="nearest"),
]

BENCHMARKS = [
    # An eighth of the queries of such an image: the reference in float64 holds 19 GB of corners for all of them.
    Case("2d lookup", 1, ((55, 128), (27, 64), (13, 32), (6, 16)), 880, 1, 256, (81, 81, 81, 81), reach=0.0),
    Case("2d guided", 1, ((64, 64),), 4096, 8, 16, (9,), reach=0.0),
    Case("3d", 1, ((16, 32, 32), (8, 16, 16)), 2560, 4, 16, (4, 4), reach=0.0),
    Case("1d", 1, ((2048,), (1024,), (512,), (256,)), 2048, 8, 32, (4, 4, 4, 4), reach=0.0),
]
