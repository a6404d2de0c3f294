"""Named inputs of deformable sampling, for tests, benchmarks and documents."""

from dataclasses import dataclass
from typing import Any

import torch

from .._shape import compute_dtype, ntuple, times

OPERATOR = "deform_sample"


@dataclass(frozen=True)
class Case:
    """The sizes of one call; :meth:`arguments` makes its tensors.

    ``out_size`` gives the number of points, which lie on a regular grid over the field, moved by random distances of
    ``spread`` pixels. With a ``spread`` of None they lie anywhere in the field and up to two pixels outside.
    """

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    out_size: tuple[int, ...]
    groups: int = 1
    boundary: str = "zeros"
    mode: str = "linear"
    spread: float | None = None

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by name, in the order of the operator's schema. Points keep clear of grid lines."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.groups, *self.out_size, self.axes)
        size = torch.tensor(self.size, dtype=torch.float64)
        if self.spread is None:
            point = torch.rand(shape, generator=generator, dtype=torch.float64) * (size + 4) - 2.5
        else:
            along = [(torch.arange(n) + 0.5) / n * s - 0.5 for n, s in zip(self.out_size, self.size, strict=True)]
            grid = torch.stack(torch.meshgrid(*along, indexing="ij"), -1).double()
            point = grid + torch.randn(shape, generator=generator, dtype=torch.float64) * self.spread
        # Half-way between two pixels the nearest one changes.
        steps = 2 if self.mode == "nearest" else 1
        low = (point * steps).floor()
        point = (low + (point * steps - low).clamp(0.05, 0.95)) / steps
        input = torch.randn(self.batch, self.channels, *self.size, generator=generator, dtype=torch.float64)
        return {
            "input": input.to(device, dtype),
            "points": point.to(device, compute_dtype(dtype)),
            "boundary": self.boundary,
            "mode": self.mode,
        }

    def __str__(self) -> str:
        groups = f" G{self.groups}" if self.groups > 1 else ""
        nearest = ", nearest" if self.mode == "nearest" else ""
        points = counted_points(self)
        return f"{self.name} (B{self.batch} C{self.channels}{groups} {times(self.size)}, {points}{nearest})"


def counted_points(case: Case) -> str:
    """The points of a case in words."""
    where = "anywhere" if case.spread is None else "in order"
    return f"{times(case.out_size)} points {where}"


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """The case of an input ``[B, C, *S]``: as many points as positions, moved by about a pixel, unless set."""
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"shape is {shape}; it must be [B, C, *S] with 1, 2 or 3 spatial axes S")
    batch, channels, *size = shape
    out_size = tuple(ntuple(settings.pop("out_size", size), len(size), "out_size", 1))
    settings.setdefault("spread", 1.0)
    groups = settings.get("groups", 1)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; the {channels} channels must be a multiple of it")
    return Case(times(shape), batch, channels, tuple(size), out_size, **settings)


CASES = [
    Case("1d", 2, 3, (11,), (17,)),
    Case("1d-groups", 3, 6, (9,), (4,), groups=3, boundary="border"),
    Case("1d-one-channel", 1, 1, (40,), (64,), spread=1.5),
    Case("1d-reflect", 2, 9, (5,), (33,), boundary="reflect", spread=6.0),
    Case("1d-nearest", 2, 2, (7,), (5,), mode="nearest"),
    Case("2d", 2, 3, (5, 6), (4, 7)),
    Case("2d-groups", 2, 12, (6, 5), (3, 3), groups=4, spread=1.0),
    Case("2d-wide", 1, 40, (9, 8), (6, 5), spread=1.0),
    Case("2d-border", 3, 16, (4, 9), (2, 5), boundary="border"),
    Case("2d-reflect", 1, 8, (3, 4), (40,) * 2, boundary="reflect", spread=5.0),
    Case("2d-nearest", 2, 17, (8, 7), (5, 6), groups=1, boundary="reflect", mode="nearest", spread=3.0),
    Case("2d-row", 1, 2, (1, 9), (1, 30), groups=2, boundary="border", mode="nearest"),
    Case("3d", 2, 3, (4, 3, 5), (3, 4, 5)),
    Case("3d-wide", 1, 24, (5, 4, 6), (2, 3, 4), groups=2, boundary="border"),
    Case("3d-reflect", 2, 1, (3, 4, 2), (6, 5, 4), boundary="reflect", spread=4.0),
    Case("3d-nearest", 1, 5, (4, 4, 3), (7, 1, 2), mode="nearest"),
]

BENCHMARKS = [
    Case("2d 64x256x256", 1, 64, (256, 256), (256, 256), spread=1.0),
    Case("2d 64x256x256 anywhere", 1, 64, (256, 256), (256, 256)),
    Case("2d 8 images 64x64x64", 8, 64, (64, 64), (64, 64), spread=1.0),
    Case("2d 8 images 3x224x224", 8, 3, (224, 224), (224, 224), spread=1.0),
    Case("3d 8 volumes 1x32x64x64", 8, 1, (32, 64, 64), (32, 64, 64), spread=1.0),
    Case("1d 64x4096", 4, 64, (4096,), (4096,), spread=1.0),
    Case("3d one channel 160x192x160", 1, 1, (160, 192, 160), (160, 192, 160), spread=1.0),
    Case("3d 16x64x64x64", 1, 16, (64, 64, 64), (64, 64, 64), spread=1.0),
    Case("3d 16x64x64x64 anywhere", 1, 16, (64, 64, 64), (64, 64, 64)),
]
