"""Named inputs of deformable aggregation for tests, benchmarks and documentation."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .._case import BaseCase, Draw, check_shape, off_grid, windowed
from .._shape import conv_output_size, times

OPERATOR = "deform_aggregate"


@dataclass(frozen=True)
class Case(BaseCase):
    """The sizes of one call; :meth:`arguments` creates its tensors."""

    name: str
    batch: int
    size: tuple[int, ...]
    heads: int
    channels: int
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    offset_scale: float = 1.0
    remove_center: bool = False
    boundary: str = "zeros"
    offset_std: float = 2.0

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        stride, padding, dilation = self.per_axis("stride", "padding", "dilation")
        out_size = conv_output_size(self.size, self.kernel_size, stride, padding, dilation)
        from_centre = self._from_centre(dilation)
        maps = (self.batch, *out_size, self.heads, len(from_centre))
        shift = off_grid(self.offset_scale * (from_centre + draw.normal(*maps, self.axes) * self.offset_std))
        return {
            "value": draw.normal(self.batch, *self.size, self.heads, self.channels),
            "offset": shift / self.offset_scale - from_centre,
            "weight": draw.normal(*maps) / len(from_centre) ** 0.5,
            "kernel_size": list(self.kernel_size),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "offset_scale": self.offset_scale,
            "remove_center": self.remove_center,
            "boundary": self.boundary,
        }

    def _from_centre(self, dilation: list[int]) -> torch.Tensor:
        """The taps without offsets, as ``[K, N]`` distances from the centre of the window."""
        steps = [torch.arange(k) * d - d * (k - 1) // 2 for k, d in zip(self.kernel_size, dilation, strict=True)]
        taps = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).reshape(-1, self.axes).double()
        kept = torch.arange(len(taps)) != len(taps) // 2
        return taps[kept] if self.remove_center else taps

    def __str__(self) -> str:
        sizes = f"B{self.batch} {times(self.size)} H{self.heads} D{self.channels}, k{times(self.kernel_size)}"
        return f"{self.name} ({sizes}, {prod(self.kernel_size) - self.remove_center} taps)"


FROM_SHAPE = ("name", "batch", "size", "heads", "channels")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the value ``[B, *S, H, D]``; by default the kernel has 3 taps along each axis and keeps the size."""
    check_shape(shape, "[B, *S, H, D]", 3)
    batch, *size, heads, channels = shape
    return Case(times(shape), batch, tuple(size), heads, channels, **windowed(settings, "value", size))


CASES = [
    Case("1d", 2, (9,), 2, 4, (3,), padding=1),
    Case("1d-even-kernel", 3, (11,), 1, 3, (4,), stride=2, padding=3, dilation=2, offset_scale=0.5),
    Case("1d-border", 1, (7,), 3, 8, (5,), padding=2, remove_center=True, boundary="border"),
    Case("1d-one-channel", 2, (13,), 5, 1, (3,), padding=4, dilation=4),
    Case("1d-one-tap", 2, (5,), 2, 5, (1,), offset_scale=2.0),
    Case("2d", 2, (5, 6), 2, 4, (3, 3), padding=1),
    Case(
        "2d-rectangular",
        1,
        (7, 5),
        3,
        5,
        (1, 3),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        offset_scale=1.5,
    ),
    Case("2d-remove-center", 2, (4, 7), 1, 16, (3, 3), padding=1, offset_scale=2.0, remove_center=True),
    Case("2d-even-kernel", 3, (5, 4), 2, 3, (2, 4), stride=2, padding=(1, 3), dilation=(3, 1), offset_scale=0.7),
    Case("2d-border", 2, (5, 5), 2, 8, (3, 3), padding=2, boundary="border"),
    Case("2d-wide", 1, (6, 7), 2, 32, (3, 3), padding=1),
    Case("2d-one-channel", 1, (1, 9), 1, 1, (1, 5), padding=(0, 2), remove_center=True),
    Case("3d", 1, (3, 4, 5), 2, 3, (3, 3, 3), padding=1),
    Case(
        "3d-steps",
        2,
        (5, 4, 6),
        3,
        8,
        (2, 1, 3),
        stride=(2, 1, 1),
        padding=(1, 0, 2),
        dilation=(1, 1, 2),
        offset_scale=-1.5,
    ),
    Case("3d-border", 1, (3, 3, 4), 1, 5, (3, 1, 3), padding=1, remove_center=True, boundary="border"),
]

BENCHMARKS = [
    Case("2d 128x56x56", 8, (56, 56), 4, 32, (3, 3), padding=1),
    Case("2d 512x14x14", 8, (14, 14), 16, 32, (3, 3), padding=1),
    Case("2d 256x100x160", 1, (100, 160), 8, 32, (3, 3), padding=1),
    Case("1d 256x2048", 4, (2048,), 8, 32, (5,), padding=2),
    Case("3d 64x16x32x32", 1, (16, 32, 32), 4, 16, (3, 3, 3), padding=1),
]
