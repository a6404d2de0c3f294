"""Stands in for ``mmcv._ext``, the compiled part of mmcv, so that ``import mmcv.ops`` works with mmcv-lite.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in that place. It provides deformable
convolution, RoI pooling and attention. All other functions of ``mmcv._ext`` exist and raise when they are called.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import __version__ as _version
from ...ops._levels import SpatialShapes
from ...ops._shape import compute_dtype
from .._attention import attend, attend_backward
from .._convolution import Steps, convolve, convolve_backward
from .._gradient import checked_gradient
from ..mmcv.roi_pool import deform_roi_pool
from ._missing import missing

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
]
__version__ = f"deformkit {_version}"

# The arguments are those that mmcv's Python gives, by these names. The buffers of columns and ones have no use here.


@torch.no_grad()
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the deformable convolution of ``input`` to ``output``, see :func:`deformkit.deform_conv2d`."""
    steps = ([dH, dW], [padH, padW], [dilationH, dilationW])
    output.copy_(convolve(input, offset, weight, None, *steps, None, group, deformable_group))


@torch.no_grad()
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients by ``input`` and ``offset`` to ``gradInput`` and ``gradOffset``."""
    steps = ([dH, dW], [padH, padW], [dilationH, dilationW])
    asked = (True, True, False, False, False)
    tensors = (gradOutput, input, offset, weight, None)
    by_input, by_offset, *_ = convolve_backward(*tensors, steps, None, group, deformable_group, asked)
    gradInput.copy_(by_input)
    gradOffset.copy_(by_offset)


@torch.no_grad()
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient by the weight to ``gradWeight``."""
    steps = ([dH, dW], [padH, padW], [dilationH, dilationW])
    asked = (False, False, True, False, False)
    tensors = (gradOutput, input, offset, gradWeight, None)
    _, _, by_weight, *_ = convolve_backward(*tensors, steps, None, group, deformable_group, asked)
    gradWeight.add_(by_weight, alpha=scale)


@torch.no_grad()
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the deformable convolution with a mask to ``output``, see :func:`deformkit.deform_conv2d`."""
    steps = ([stride_h, stride_w], [pad_h, pad_w], [dilation_h, dilation_w])
    used = bias if with_bias else None
    output.copy_(convolve(input, offset, weight, used, *steps, mask, group, deformable_group))


@torch.no_grad()
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the gradients by ``input``, ``offset`` and ``mask``; add those by ``weight`` and ``bias``."""
    steps: Steps = ([stride_h, stride_w], [pad_h, pad_w], [dilation_h, dilation_w])
    tensors = (grad_output, input, offset, weight, bias if with_bias else None)
    by_input, by_offset, by_weight, by_bias, by_mask = convolve_backward(*tensors, steps, mask, group, deformable_group)
    grad_input.copy_(by_input)
    grad_offset.copy_(by_offset)
    grad_mask.copy_(by_mask)
    grad_weight.add_(by_weight)
    if with_bias:
        grad_bias.add_(by_bias)


@torch.no_grad()
def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Write the pooled RoIs to ``output``, see :func:`deformkit.deform_roi_pool`; an empty ``offset`` is none."""
    numbers = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    output.copy_(deform_roi_pool(input, rois, offset if offset.numel() else None, *numbers))


@torch.no_grad()
def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Write the gradients by ``input`` and ``offset``."""
    numbers = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    moved = offset if offset.numel() else None

    def forward(input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
        return deform_roi_pool(input, rois, offset, *numbers)

    grad_output = checked_gradient(forward, (input, rois, moved), grad_output)
    by_input, by_offset = torch.ops.deformkit.deform_roi_pool_backward(
        grad_output,
        input,
        rois.to(compute_dtype(input.dtype)),
        moved,
        [pooled_height, pooled_width],
        spatial_scale,
        sampling_ratio,
        gamma,
        [],
        [True, moved is not None],
    )
    grad_input.copy_(by_input)
    if moved is not None:
        grad_offset.copy_(by_offset)


@torch.no_grad()
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, see :func:`deformkit.ms_deform_attn`."""
    return attend(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


@torch.no_grad()
def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients by ``value``, ``sampling_loc`` and ``attn_weight``."""
    given = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    grads = attend_backward(*given, grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


def __getattr__(name: str) -> Callable[..., Any]:
    return missing("mmcv._ext", name)
