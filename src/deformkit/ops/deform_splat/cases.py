"""Named inputs of splatting, for tests, benchmarks and documents."""

from dataclasses import dataclass
from typing import Any

import torch

from .._shape import compute_dtype, ntuple, times

OPERATOR = "deform_splat"


@dataclass(frozen=True)
class Case:
    """The sizes of one call; :meth:`arguments` makes its tensors.

    The values lie on a regular grid over the result, moved by random distances of ``spread`` pixels. With a ``spread``
    of None they lie anywhere in the result and up to two pixels outside.
    """

    name: str
    batch: int
    channels: int
    in_size: tuple[int, ...]
    size: tuple[int, ...]
    groups: int = 1
    boundary: str = "zeros"
    spread: float | None = None

    @property
    def axes(self) -> int:
        """Number of spatial axes of the result."""
        return len(self.size)

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by name, in the order of the operator's schema. Points keep clear of grid lines."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.groups, *self.in_size, self.axes)
        size = torch.tensor(self.size, dtype=torch.float64)
        if self.spread is None:
            point = torch.rand(shape, generator=generator, dtype=torch.float64) * (size + 4) - 2.5
        else:
            along = [(torch.arange(n) + 0.5) / n * s - 0.5 for n, s in zip(self.in_size, self.size, strict=True)]
            grid = torch.stack(torch.meshgrid(*along, indexing="ij"), -1).double()
            point = grid + torch.randn(shape, generator=generator, dtype=torch.float64) * self.spread
        low = point.floor()
        point = low + (point - low).clamp(0.05, 0.95)
        input = torch.randn(self.batch, self.channels, *self.in_size, generator=generator, dtype=torch.float64)
        return {
            "input": input.to(device, dtype),
            "points": point.to(device, compute_dtype(dtype)),
            "size": list(self.size),
            "boundary": self.boundary,
        }

    def __str__(self) -> str:
        groups = f" G{self.groups}" if self.groups > 1 else ""
        where = "anywhere" if self.spread is None else "in order"
        return (
            f"{self.name} (B{self.batch} C{self.channels}{groups} {times(self.in_size)} {where} to {times(self.size)})"
        )


FROM_SHAPE = ("name", "batch", "channels", "in_size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """The case of an input ``[B, C, *in]``: a result of the same size, points moved by about a pixel, unless set."""
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"shape is {shape}; it must be [B, C, *in] with 1, 2 or 3 axes in")
    batch, channels, *in_size = shape
    size = tuple(ntuple(settings.pop("size", in_size), len(in_size), "size", 1))
    settings.setdefault("spread", 1.0)
    groups = settings.get("groups", 1)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; the {channels} channels must be a multiple of it")
    return Case(times(shape), batch, channels, tuple(in_size), size, **settings)


CASES = [
    Case("1d", 2, 3, (17,), (11,)),
    Case("1d-groups", 3, 6, (4,), (9,), groups=3, boundary="border"),
    Case("1d-reflect", 1, 9, (33,), (5,), boundary="reflect", spread=6.0),
    Case("2d", 2, 3, (4, 7), (5, 6)),
    Case("2d-groups", 1, 12, (3, 3), (6, 5), groups=4, spread=1.0),
    Case("2d-border", 3, 16, (2, 5), (4, 9), boundary="border"),
    Case("2d-reflect", 1, 2, (9, 7), (3, 4), boundary="reflect", spread=5.0),
    Case("3d", 2, 3, (3, 4, 5), (4, 3, 5)),
    Case("3d-reflect", 1, 2, (5, 4, 2), (3, 4, 2), groups=2, boundary="reflect", spread=4.0),
]

BENCHMARKS = [
    Case("2d 64x256x256", 1, 64, (256, 256), (256, 256), spread=1.0),
    Case("2d 64x256x256 anywhere", 1, 64, (256, 256), (256, 256)),
    Case("1d 64x4096", 4, 64, (4096,), (4096,), spread=1.0),
    Case("3d 16x64x64x64", 1, 16, (64, 64, 64), (64, 64, 64), spread=1.0),
]
