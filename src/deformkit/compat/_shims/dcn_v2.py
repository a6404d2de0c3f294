"""Stands in for ``dcn_v2`` and its compiled part ``_ext``, the DCNv2 of CenterNet and many others.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in their place.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Conv2d

from ... import __version__ as _version
from .._convolution import convolve_backward
from ..mmcv.conv import ModulatedDeformConv2d, modulated_deform_conv2d, offset_head, split_head, zero_head
from ._pooling import DCNPooling, DCNv2Pooling, dcn_v2_pooling
from ._pooling import psroi_pooling_backward as dcn_v2_psroi_pooling_backward
from ._pooling import psroi_pooling_forward as dcn_v2_psroi_pooling_forward

__all__ = [
    "DCN",
    "DCNPooling",
    "DCNv2",
    "DCNv2Pooling",
    "dcn_v2_backward",
    "dcn_v2_conv",
    "dcn_v2_forward",
    "dcn_v2_pooling",
    "dcn_v2_psroi_pooling_backward",
    "dcn_v2_psroi_pooling_forward",
]
__version__ = f"deformkit {_version}"


def dcn_v2_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    deformable_group: int,
) -> Tensor:
    """Deformable convolution with a mask, see :func:`deformkit.deform_conv2d`; the kernel's size is the weight's."""
    steps = ([stride_h, stride_w], [pad_h, pad_w], [dilation_h, dilation_w])
    return modulated_deform_conv2d(input, offset, mask, weight, bias, *steps, 1, deformable_group)


def dcn_v2_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    deformable_group: int,
) -> list[Tensor]:
    """The gradients by ``input``, ``offset``, ``mask``, ``weight`` and ``bias`` for that of the output."""
    steps = ([stride_h, stride_w], [pad_h, pad_w], [dilation_h, dilation_w])
    grads = convolve_backward(grad_output, input, offset, weight, bias, steps, mask, 1, deformable_group)
    by_input, by_offset, by_weight, by_bias, by_mask = grads
    return [by_input, by_offset, by_mask, by_weight, by_bias]


def dcn_v2_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    deformable_groups: int,
) -> Tensor:
    """:func:`deformkit.compat.mmcv.modulated_deform_conv2d` with one group."""
    return modulated_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, 1, deformable_groups)


class DCNv2(ModulatedDeformConv2d):
    """The layer ``DCNv2``: :class:`deformkit.compat.mmcv.ModulatedDeformConv2d` with the arguments of that project."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, 1, deformable_groups)
        self.deformable_groups = deformable_groups


class DCN(DCNv2):
    """The layer ``DCN``, which predicts its offsets and mask from a convolution ``conv_offset_mask``."""

    conv_offset_mask: Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, deformable_groups)
        self.conv_offset_mask = offset_head(self, 3)
        self.init_offset()

    def init_offset(self) -> None:
        """Set the predicted offsets to zero, and the mask to 1/2."""
        zero_head(self.conv_offset_mask)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # it predicts the offsets
        """Convolve ``input`` at the points that the layer predicts from it."""
        return super().forward(input, *split_head(self.conv_offset_mask(input)))
