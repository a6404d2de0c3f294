"""Named inputs of deformable convolution for tests, benchmarks and documentation."""

from dataclasses import dataclass
from typing import Any

from .._case import ConvolutionCase, Draw, check_divisor, check_shape, windowed
from .._shape import conv_output_size, times

OPERATOR = "deform_conv"


@dataclass(frozen=True)
class Case(ConvolutionCase):
    """The sizes of one call; :meth:`arguments` creates its tensors."""

    bias: bool = True

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        stride, padding, dilation = self.per_axis("stride", "padding", "dilation")
        out_size = conv_output_size(self.size, self.kernel_size, stride, padding, dilation)
        offset = self.offset(draw, out_size)
        return {
            "input": draw.normal(self.batch, self.channels, *self.size),
            "offset": offset,
            "weight": self.weight(draw, self.out_channels, self.channels // self.groups),
            "bias": draw.normal(self.out_channels) if self.bias else None,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "mask": self.mask(draw, out_size),
            "boundary": self.boundary,
        }


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the input ``[B, C, *S]``; by default the kernel is 3x3 and keeps size and number of channels."""
    check_shape(shape, "[B, C, *S]", 2)
    batch, channels, *size = shape
    settings = windowed({"out_channels": channels, **settings}, "input", size)
    check_divisor(settings, "groups", channels=channels, out_channels=settings["out_channels"])
    check_divisor(settings, "offset_groups", channels=channels)
    return Case(times(shape), batch, channels, tuple(size), **settings)


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
