"""Named inputs of the transposed deformable convolution, for tests, benchmarks and documents."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .._shape import ntuple, times, transposed_output_size

OPERATOR = "deform_conv_transpose"


@dataclass(frozen=True)
class Case:
    """The sizes of one call; :meth:`arguments` makes its tensors."""

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    output_padding: int | tuple[int, ...] = 0
    groups: int = 1
    dilation: int | tuple[int, ...] = 1
    offset_groups: int = 1
    modulated: bool = True
    boundary: str = "zeros"
    offset_std: float = 2.0

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by name, in the order of the operator's schema. Offsets keep clear of grid lines."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        taps, fan_in = prod(self.kernel_size), self.channels // self.groups * prod(self.kernel_size)
        offset = normal(self.batch, self.offset_groups * taps * self.axes, *self.size) * self.offset_std
        offset = offset.floor() + (offset - offset.floor()).clamp(0.05, 0.95)
        tensors = {
            "input": normal(self.batch, self.channels, *self.size),
            "offset": offset,
            "weight": normal(self.channels, self.out_channels // self.groups, *self.kernel_size) / fan_in**0.5,
            "mask": normal(self.batch, self.offset_groups * taps, *self.size).sigmoid() if self.modulated else None,
        }
        ready = {name: value if value is None else value.to(device, dtype) for name, value in tensors.items()}
        mask = ready.pop("mask")
        stride, padding, output_padding, dilation = (
            [step] * self.axes if isinstance(step, int) else list(step)
            for step in (self.stride, self.padding, self.output_padding, self.dilation)
        )
        steps = {"stride": stride, "padding": padding, "output_padding": output_padding}
        return {
            **ready,
            **steps,
            "groups": self.groups,
            "dilation": dilation,
            "mask": mask,
            "boundary": self.boundary,
        }

    def __str__(self) -> str:
        sizes = f"B{self.batch} C{self.channels} {times(self.size)} -> {self.out_channels}, k{times(self.kernel_size)}"
        return f"{self.name} ({sizes})"


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """The case of an input ``[B, C, *S]``: a 4x4 kernel, half as many output channels, twice the size, unless set."""
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"shape is {shape}; it must be [B, C, *S] with 1, 2 or 3 spatial axes S")
    batch, channels, *size = shape
    settings = {"stride": 2, "padding": 1, "out_channels": max(channels // 2, 1), **settings}
    kernel = tuple(ntuple(settings.pop("kernel_size", 4), len(size), "kernel_size", 1))
    least = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    steps = [ntuple(settings.get(name, low), len(size), name, low) for name, low in least.items()]
    if min(transposed_output_size(size, kernel, *steps)) < 1:
        raise ValueError(f"padding is {settings['padding']}; it leaves no output of a shape {shape}")
    counts = {"channels": channels, "out_channels": settings["out_channels"]}
    for name, divisor in (("channels", "groups"), ("out_channels", "groups"), ("out_channels", "offset_groups")):
        if counts[name] % settings.get(divisor, 1):
            raise ValueError(f"{divisor} is {settings[divisor]}; it must divide {name}, which is {counts[name]}")
    return Case(times(shape), batch, channels, tuple(size), kernel_size=kernel, **settings)


CASES = [
    Case("1d", 2, 4, (5,), 6, (3,), stride=2, padding=1),
    Case("1d-border", 1, 6, (7,), 4, (4,), padding=2, groups=2, dilation=2, offset_groups=2, boundary="border"),
    Case("1d-depthwise", 2, 5, (6,), 5, (3,), stride=2, output_padding=1, groups=5, offset_groups=5, modulated=False),
    Case("2d", 2, 4, (3, 4), 6, (3, 3), stride=2, padding=1, output_padding=1),
    Case(
        "2d-rectangular",
        1,
        4,
        (4, 3),
        6,
        (1, 3),
        stride=(3, 1),
        padding=(0, 1),
        output_padding=(2, 0),
        groups=2,
        dilation=(1, 2),
        offset_groups=3,
    ),
    Case("2d-v1", 3, 2, (3, 5), 3, (2, 2), stride=2, modulated=False),
    Case("2d-wide", 1, 24, (5, 4), 40, (3, 3), padding=1, groups=2, offset_groups=2, boundary="border"),
    Case("3d", 1, 4, (2, 3, 2), 3, (3, 3, 3), stride=2, padding=1),
    Case(
        "3d-steps", 2, 4, (2, 3, 2), 4, (2, 1, 3), stride=(2, 1, 2), output_padding=(1, 0, 0), groups=2, offset_groups=4
    ),
]

BENCHMARKS = [
    Case("2d 128x64x64", 1, 128, (64, 64), 64, (4, 4), stride=2, padding=1, offset_std=0.5),
    Case("2d 256x32x32", 2, 256, (32, 32), 128, (4, 4), stride=2, padding=1, offset_std=0.5),
    Case("2d 64x128x128", 1, 64, (128, 128), 64, (3, 3), padding=1, offset_std=0.5),
    Case("1d 128x1024", 4, 128, (1024,), 64, (4,), stride=2, padding=1, offset_std=0.5),
    Case("3d 32x8x28x28", 1, 32, (8, 28, 28), 32, (2, 2, 2), stride=2, offset_std=0.5),
]
