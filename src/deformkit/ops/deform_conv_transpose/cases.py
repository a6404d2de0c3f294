"""Named inputs of the transposed deformable convolution for tests, benchmarks and documentation."""

from dataclasses import dataclass
from typing import Any

from .._case import ConvolutionCase, Draw, check_divisor, check_shape
from .._shape import ntuple, times, transposed_output_size

OPERATOR = "deform_conv_transpose"


@dataclass(frozen=True)
class Case(ConvolutionCase):
    """The sizes of one call; :meth:`arguments` creates its tensors."""

    output_padding: int | tuple[int, ...] = 0

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        stride, padding, output_padding, dilation = self.per_axis("stride", "padding", "output_padding", "dilation")
        offset = self.offset(draw, self.size)
        return {
            "input": draw.normal(self.batch, self.channels, *self.size),
            "offset": offset,
            "weight": self.weight(draw, self.channels, self.out_channels // self.groups),
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": self.groups,
            "dilation": dilation,
            "mask": self.mask(draw, self.size),
            "boundary": self.boundary,
        }


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the input ``[B, C, *S]``; by default a 4x4 kernel halves the channels and doubles the size."""
    check_shape(shape, "[B, C, *S]", 2)
    batch, channels, *size = shape
    settings = {"stride": 2, "padding": 1, "out_channels": max(channels // 2, 1), **settings}
    kernel = ntuple(settings.pop("kernel_size", 4), len(size), "kernel_size", 1)
    least = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    steps = [ntuple(settings.get(name, low), len(size), name, low) for name, low in least.items()]
    if min(transposed_output_size(size, kernel, *steps)) < 1:
        raise ValueError(f"padding is {settings['padding']}; it leaves no output of a shape {shape}")
    check_divisor(settings, "groups", channels=channels, out_channels=settings["out_channels"])
    check_divisor(settings, "offset_groups", out_channels=settings["out_channels"])
    return Case(times(shape), batch, channels, tuple(size), kernel_size=tuple(kernel), **settings)


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
