"""Named inputs of the deformable correlation, for tests, benchmarks and documents."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .._shape import compute_dtype, times

OPERATOR = "deform_correlate"


@dataclass(frozen=True)
class Case:
    """The sizes of one call; :meth:`arguments` makes its tensors.

    ``reach``: how far beyond the edge of a level points are drawn, in pixels.
    """

    name: str
    batch: int
    sizes: tuple[tuple[int, ...], ...]
    queries: int
    heads: int
    channels: int
    points: tuple[int, ...]
    mode: str = "linear"
    reach: float = 1.5

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.sizes[0])

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by name, in the order of the operator's schema. Locations keep clear of grid lines."""
        generator = torch.Generator().manual_seed(seed)
        draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        locations = []
        for size, count in zip(self.sizes, self.points, strict=True):
            extent = torch.tensor(size, dtype=torch.float64)
            unit = torch.rand(self.batch, self.queries, self.heads, count, self.axes, **draw)
            pixel = unit * (extent + 2 * self.reach) - self.reach - 0.5
            pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.05, 0.95)
            locations.append(((pixel + 0.5) / extent).flip(-1))
        query = torch.randn(self.batch, self.queries, self.heads * self.channels, **draw) / self.channels**0.5
        key = torch.randn(self.batch, sum(map(prod, self.sizes)), self.heads, self.channels, **draw)
        return {
            "query": query.to(device, dtype),
            "key": key.to(device, dtype),
            "spatial_shapes": [length for size in self.sizes for length in size],
            "sampling_locations": torch.cat(locations, 3).to(device, compute_dtype(dtype)),
            "num_points": list(self.points),
            "mode": self.mode,
        }

    def __str__(self) -> str:
        levels = " ".join(times(size) for size in self.sizes)
        points = "+".join(map(str, self.points))
        return f"{self.name} (B{self.batch} {levels}, Q{self.queries} H{self.heads} D{self.channels} P{points})"


FROM_SHAPE = ("name", "batch", "heads", "channels", "queries")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """The case of a query ``[B, Q, H, D]``, with ``sizes`` of the levels: 9 points a level, unless set."""
    if len(shape) != 4:
        raise ValueError(f"shape is {shape}; it must be [B, Q, H, D]")
    batch, queries, heads, channels = shape
    sizes = settings.pop("sizes", None)
    if not sizes:
        raise ValueError(f"sizes is {sizes}; it must be set to the sizes of the levels")
    points = settings.pop("points", 9)
    points = (points,) * len(sizes) if isinstance(points, int) else tuple(points)
    settings = {"reach": 0.0, **settings}
    return Case(times(shape), batch, tuple(sizes), queries, heads, channels, points, **settings)


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
