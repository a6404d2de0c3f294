"""Linear deformable convolution: a kernel of any number of taps."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._shape import check_count, check_floating
from ._public import OwnNames
from .deform_conv import DeformConv1d, DeformConv2d, DeformConv3d

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DEFORM_CONVS: dict[int, Any] = {1: DeformConv1d, 2: DeformConv2d, 3: DeformConv3d}


def initial_taps(num_taps: int, axes: int) -> Tensor:
    """The taps of a new kernel, ``[num_taps, N]``: in row-major order in a cube whose last rows may be missing."""
    side = 1
    while side**axes < num_taps:
        side += 1
    number, along = torch.arange(num_taps), []
    for _ in range(axes):
        along.append(number % side)
        number = number // side
    taps = torch.stack(along[::-1], 1)
    # Whole pixels, with the middle of the occupied cube at 0.
    return taps - taps.amax(0) // 2


class _LDConv(OwnNames, nn.Module):
    spatial_dims: ClassVar[int]
    taps: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, num_taps: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        axes = self.spatial_dims
        for name, count in {"num_taps": num_taps, "stride": stride}.items():
            check_count(name, count)
        self.in_channels, self.num_taps, self.stride = in_channels, num_taps, stride
        # All taps lie in a column, from which their offsets move them to the places of a new kernel and on.
        kernel, padding = [num_taps] + [1] * (axes - 1), [(num_taps - 1) // 2] + [0] * (axes - 1)
        rest: dict[str, Any] = {"groups": groups, "bias": bias, "boundary": "border"}
        self.conv = _DEFORM_CONVS[axes](in_channels, out_channels, kernel, stride, padding, **rest)
        self.offset_head = _CONVS[axes](in_channels, num_taps * axes, 3, stride, 1)
        shift = initial_taps(num_taps, axes)
        shift[:, 0] -= torch.arange(num_taps) - padding[0]
        self.register_buffer("taps", shift.flatten().float(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the taps start at their initial places."""
        for parameter in self.offset_head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` at the taps that the layer predicts from it."""
        check_floating("input", input)
        axes = self.spatial_dims
        if input.dim() != axes + 2 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"input has shape {list(input.shape)}; it must have {axes + 2} axes and {self.in_channels} channels"
            )
        raw = self.offset_head(input)
        # In half precision the places of many taps are not exact.
        offset = raw.to(torch.promote_types(raw.dtype, torch.float32)) + self.taps.reshape(-1, *[1] * axes)
        if self.num_taps % 2 == 0:
            # The boundary rule gives the same value in another row, and the output then has the size of the offsets.
            input = F.pad(input, [0, 0] * (axes - 1) + [0, 1], mode="replicate")
        return self.conv(input, offset)

    def extra_repr(self) -> str:
        """The arguments of the constructor that the convolution does not show."""
        return f"num_taps={self.num_taps}, stride={self.stride}"


class LDConv1d(_LDConv):
    """Linear deformable convolution of a sequence; :class:`LDConv2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, output ``[B, Cout, Lout]``.

    Example:
        >>> import torch
        >>> LDConv1d(4, 8, num_taps=6, stride=2)(torch.randn(1, 4, 21)).shape
        torch.Size([1, 8, 11])
    """

    spatial_dims = 1


class LDConv2d(_LDConv):
    """Linear deformable convolution of an image, also called AKConv: any number of taps, which all move.

    ``output[b, f, o] = bias[f] + sum over c, n of
    weight[f, c, n] * sample(input[b, c], stride*o + taps[n] + offset_head(input)[b, n, o])``

    The number of parameters grows linearly with the number of taps, which need not be a square. The ``taps`` of a new
    layer lie in rows of ``ceil(sqrt(num_taps))`` around the position; the last row may be shorter. Points are clamped
    into the input. The offset head is a convolution with a 3x3 kernel, which starts at 0. The convolution is
    :class:`DeformConv2d` with a kernel of ``(num_taps, 1)``; no samples of all taps are kept. Normalisation and
    activation, which the published block contains, are left to the network.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_taps: number of taps.
        stride: step of the output positions, in pixels.
        groups: number of groups of channels that are convolved separately.
        bias: whether to add a learnable bias.

    Shapes: ``input [B, C, H, W]``, output ``[B, Cout, (H - 1)//stride + 1, (W - 1)//stride + 1]``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> LDConv2d(4, 8, num_taps=5)(torch.randn(1, 4, 20, 24)).shape
        torch.Size([1, 8, 20, 24])

    Paper: LDConv: Linear deformable convolution, https://arxiv.org/abs/2311.11587.
    """

    spatial_dims = 2


class LDConv3d(_LDConv):
    """Linear deformable convolution of a volume; :class:`LDConv2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, output ``[B, Cout, Dout, Hout, Wout]``.

    Example:
        >>> import torch
        >>> LDConv3d(2, 4, num_taps=7)(torch.randn(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    spatial_dims = 3
