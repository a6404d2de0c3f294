"""Deformable convolution with the arguments that mmcv and DCNv2 share, forward and backward, in 1-D, 2-D and 3-D."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import deform_conv1d, deform_conv2d, deform_conv3d
from ..ops._shape import check_floating, code_of, prod, times
from ._autocast import without_autocast
from ._gradient import checked_gradient

_OPERATORS = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}

Steps = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Stride, padding and dilation, along each axis."""


def convolve(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Tensor | None,
    groups: int,
    deform_groups: int,
    axes: int = 2,
) -> Tensor:
    """:func:`deformkit.deform_conv2d`, or another number of axes, in the dtype of ``offset`` and without autocast.

    ``groups`` and ``deform_groups`` must agree with the shapes.
    """
    for name, value in (("input", input), ("offset", offset), ("weight", weight)):
        check_floating(name, value)
        if value.dim() != axes + 2:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must have {axes + 2} axes")
    # The operator derives both numbers from the shapes and would accept others.
    channels, per_group, kernel = input.shape[1], weight.shape[1], weight.shape[2:]
    if channels != groups * per_group:
        raise ValueError(
            f"groups is {groups}; input has {channels} channels and weight {per_group} for each group"
            + _needed(channels, per_group)
        )
    needed = axes * prod(kernel)
    if offset.shape[1] != deform_groups * needed:
        raise ValueError(
            f"deform_groups is {deform_groups}; offset has {offset.shape[1]} channels, and a {times(kernel)} kernel "
            f"needs {needed} for each group" + _needed(offset.shape[1], needed)
        )
    tensors = [value if value is None else value.to(offset.dtype) for value in (input, weight, bias, mask)]
    input, weight, bias, mask = tensors  # type: ignore[assignment]  # only the last two may be None
    with without_autocast(input):
        return _OPERATORS[axes](input, offset, weight, bias, stride, padding, dilation, mask)


def convolve_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    steps: Steps,
    mask: Tensor | None,
    groups: int,
    deform_groups: int,
    output_mask: Sequence[bool] = (True,) * 5,
) -> list[Tensor]:
    """The gradients of :func:`convolve` by ``input``, ``offset``, ``weight``, ``bias`` and ``mask``.

    Each has the dtype of its tensor. One that is None, or that ``output_mask`` does not ask for, is an empty tensor.
    """
    given = (input, offset, weight, bias, mask)

    def forward(
        input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return convolve(input, offset, weight, bias, *steps, mask, groups, deform_groups, len(steps[0]))

    grad_output = checked_gradient(forward, given, grad_output)
    *tensors, factors = (value if value is None else value.to(offset.dtype) for value in given)
    asked = [yes and value is not None for yes, value in zip(output_mask, given, strict=True)]
    zeros = code_of("boundary", "zeros")
    grads = torch.ops.deformkit.deform_conv_backward(grad_output, *tensors, *steps, factors, zeros, asked)
    return [grad if value is None else grad.to(value.dtype) for grad, value in zip(grads, given, strict=True)]


def _needed(channels: int, per_group: int) -> str:
    """How many groups there are, if so many channels for each add up to ``channels``."""
    if channels < 1 or per_group < 1 or channels % per_group:
        return ", of which it is no multiple"
    return f", so that it must be {channels // per_group}"
