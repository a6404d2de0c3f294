"""Stands in for ``DCN`` and ``D3D``, the compiled modules of many DCNv2 projects, of NLSPN and of D3D.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in their place. Both names have the same
functions here, for images and for volumes: the number of axes is that of the input. The position-sensitive RoI pooling
is that of images. All other functions exist and raise when they are called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import __version__ as _version
from ...ops._shape import check_tensor
from .._convolution import Steps, convolve, convolve_backward
from ._missing import missing
from ._pooling import psroi_pooling_backward as deform_psroi_pooling_backward
from ._pooling import psroi_pooling_forward as deform_psroi_pooling_forward

__all__ = [
    "deform_conv_backward",
    "deform_conv_forward",
    "deform_psroi_pooling_backward",
    "deform_psroi_pooling_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]
__version__ = f"deformkit {_version}"

# Behind the tensors come kernel, stride, padding and dilation along each axis, group, deformable_group, im2col_step.


@torch.no_grad()
def deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, *numbers: int) -> Tensor:
    """Deformable convolution, see :func:`deformkit.deform_conv2d` and :func:`deformkit.deform_conv3d`."""
    steps, groups = _window(weight, numbers)
    return convolve(input, offset, weight, bias, *steps, None, *groups, len(steps[0]))


@torch.no_grad()
def deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, grad_output: Tensor, *numbers: int
) -> list[Tensor]:
    """The gradients by ``input``, ``offset``, ``weight`` and ``bias`` for that of the output."""
    steps, groups = _window(weight, numbers)
    return convolve_backward(grad_output, input, offset, weight, bias, steps, None, *groups)[:4]


@torch.no_grad()
def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor, *numbers: int
) -> Tensor:
    """Deformable convolution with a mask, see :func:`deformkit.deform_conv2d` and :func:`deformkit.deform_conv3d`."""
    steps, groups = _window(weight, numbers)
    return convolve(input, offset, weight, bias, *steps, mask, *groups, len(steps[0]))


@torch.no_grad()
def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor, grad_output: Tensor, *numbers: int
) -> list[Tensor]:
    """The gradients by ``input``, ``offset``, ``mask``, ``weight`` and ``bias`` for that of the output."""
    steps, groups = _window(weight, numbers)
    grads = convolve_backward(grad_output, input, offset, weight, bias, steps, mask, *groups)
    by_input, by_offset, by_weight, by_bias, by_mask = grads
    return [by_input, by_offset, by_mask, by_weight, by_bias]


def _window(weight: Tensor, numbers: Sequence[int]) -> tuple[Steps, tuple[int, int]]:
    """The steps along each axis, and both numbers of groups."""
    check_tensor("weight", weight)
    axes = weight.dim() - 2
    if axes not in (1, 2, 3):
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [Cout, C/groups, *kernel]")
    if len(numbers) != 4 * axes + 3:
        raise ValueError(
            f"{len(numbers)} numbers follow the tensors; with a weight of {axes} spatial axes there must be "
            f"{4 * axes + 3}: kernel, stride, padding, dilation along each axis, group, deformable_group, im2col_step"
        )
    stride, padding, dilation = (list(numbers[axes * i : axes * (i + 1)]) for i in (1, 2, 3))
    group, deformable_group, _ = numbers[4 * axes :]
    return (stride, padding, dilation), (group, deformable_group)


def __getattr__(name: str) -> Callable[..., Any]:
    return missing("DCN", name)
