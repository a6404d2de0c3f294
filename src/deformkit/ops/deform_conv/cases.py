"""Named inputs of deformable convolution for tests, benchmarks and documentation."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .._shape import checked_output_size, conv_output_size, ntuple, times

OPERATOR = "deform_conv"


@dataclass(frozen=True)
class Case:
    """The sizes of one call; :meth:`arguments` creates its tensors."""

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    bias: bool = True
    boundary: str = "zeros"
    offset_std: float = 2.0

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by name, in the order of the schema. No point is near a grid line."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        stride, padding, dilation = ([v] * self.axes if isinstance(v, int) else list(v) for v in self._steps)
        out_size = conv_output_size(self.size, self.kernel_size, stride, padding, dilation)
        taps, fan_in = prod(self.kernel_size), self.channels // self.groups * prod(self.kernel_size)
        offset = normal(self.batch, self.offset_groups * taps * self.axes, *out_size) * self.offset_std
        offset = offset.floor() + (offset - offset.floor()).clamp(0.05, 0.95)
        tensors = {
            "input": normal(self.batch, self.channels, *self.size),
            "offset": offset,
            "weight": normal(self.out_channels, self.channels // self.groups, *self.kernel_size) / fan_in**0.5,
            "bias": normal(self.out_channels) if self.bias else None,
            "mask": normal(self.batch, self.offset_groups * taps, *out_size).sigmoid() if self.modulated else None,
        }
        ready = {name: value if value is None else value.to(device, dtype) for name, value in tensors.items()}
        mask = ready.pop("mask")
        steps = {"stride": stride, "padding": padding, "dilation": dilation}
        return {**ready, **steps, "mask": mask, "boundary": self.boundary}

    @property
    def _steps(self) -> tuple[int | tuple[int, ...], ...]:
        return self.stride, self.padding, self.dilation

    def __str__(self) -> str:
        sizes = f"B{self.batch} C{self.channels} {times(self.size)} -> {self.out_channels}, k{times(self.kernel_size)}"
        return f"{self.name} ({sizes})"


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the input ``[B, C, *S]``; by default the kernel is 3x3 and keeps size and number of channels."""
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"shape is {shape}; it must be [B, C, *S] with 1, 2 or 3 spatial axes S")
    batch, channels, *size = shape
    kernel = tuple(ntuple(settings.pop("kernel_size", 3), len(size), "kernel_size", 1))
    dilation = ntuple(settings.setdefault("dilation", 1), len(size), "dilation", 1)
    settings.setdefault("padding", tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)))
    stride = ntuple(settings.get("stride", 1), len(size), "stride", 1)
    checked_output_size("input", size, kernel, stride, ntuple(settings["padding"], len(size), "padding", 0), dilation)
    counts = {"channels": channels, "out_channels": settings.setdefault("out_channels", channels)}
    for name, divisor in (("channels", "groups"), ("out_channels", "groups"), ("channels", "offset_groups")):
        if counts[name] % settings.get(divisor, 1):
            raise ValueError(f"{divisor} is {settings[divisor]}; it must divide {name}, which is {counts[name]}")
    return Case(times(shape), batch, channels, tuple(size), kernel_size=kernel, **settings)


CASES = [
    Case("1d", 2, 4, (9,), 6, (3,), padding=1),
    Case("1d-even-kernel", 3, 2, (11,), 3, (4,), stride=2, padding=3, dilation=2, modulated=False),
    Case("1d-border", 1, 6, (7,), 4, (3,), padding=1, groups=2, offset_groups=3, boundary="border"),
    Case("1d-depthwise", 2, 5, (13,), 5, (3,), padding=4, dilation=4, groups=5, offset_groups=5),
    Case("1d-pointwise", 2, 3, (5,), 1, (1,), bias=False),
    Case("2d", 2, 4, (5, 6), 6, (3, 3), padding=1),
    Case(
        "2d-rectangular",
        1,
        6,
        (7, 5),
        4,
        (1, 3),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        groups=2,
        offset_groups=3,
    ),
    Case("2d-v1", 3, 2, (4, 7), 3, (2, 2), stride=2, modulated=False, bias=False),
    Case("2d-border", 2, 4, (5, 5), 2, (3, 3), padding=2, offset_groups=2, boundary="border"),
    Case("2d-depthwise", 1, 16, (6, 5), 32, (3, 3), padding=1, groups=16),
    Case("2d-wide", 1, 40, (6, 7), 24, (3, 3), padding=1, groups=2, offset_groups=2),
    Case("2d-one-channel", 1, 1, (1, 9), 1, (1, 5), padding=(0, 2)),
    Case("3d", 1, 4, (3, 4, 5), 3, (3, 3, 3), padding=1),
    Case(
        "3d-steps",
        2,
        4,
        (5, 4, 6),
        4,
        (2, 1, 3),
        stride=(2, 1, 1),
        padding=(1, 0, 2),
        dilation=(1, 1, 2),
        groups=2,
        offset_groups=4,
    ),
    Case("3d-border", 1, 2, (3, 3, 4), 2, (2, 2, 2), padding=1, modulated=False, boundary="border"),
]

BENCHMARKS = [
    Case("2d 64x128x128", 1, 64, (128, 128), 64, (3, 3), padding=1),
    Case("2d 128x64x64", 2, 128, (64, 64), 128, (3, 3), padding=1),
    Case("2d 256x56x84", 1, 256, (56, 84), 256, (3, 3), padding=1),
    Case("2d 256x32x32", 4, 256, (32, 32), 256, (3, 3), padding=1),
    Case("2d 512x25x42", 2, 512, (25, 42), 512, (3, 3), padding=1),
    Case("2d 64x180x320 og8", 1, 64, (180, 320), 64, (3, 3), padding=1, offset_groups=8),
    Case("2d k7 64x64x64", 1, 64, (64, 64), 256, (7, 7), padding=3),
    Case("1d k16 d3 L128", 16, 512, (128,), 512, (16,), padding=22, dilation=3, modulated=False),
    Case("1d k5 L1024", 8, 128, (1024,), 128, (5,), padding=2, modulated=False),
    Case(
        "1d depthwise",
        4,
        512,
        (2000,),
        512,
        (3,),
        padding=4,
        dilation=4,
        groups=512,
        offset_groups=512,
        modulated=False,
    ),
    Case("3d 32x16x32x32", 1, 32, (16, 32, 32), 32, (3, 3, 3), padding=1),
    Case("3d 64x8x28x28", 1, 64, (8, 28, 28), 64, (3, 3, 3), padding=1),
]
