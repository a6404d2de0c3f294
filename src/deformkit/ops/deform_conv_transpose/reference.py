"""The definition of the transposed deformable convolution, in tensor operations."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._shape import compute_dtype, transposed_output_size
from ..sample.reference import splat, tap_grid


def deform_conv_transpose(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    mask: Tensor | None,
    boundary: str,
) -> Tensor:
    """Transposed deformable convolution; see :func:`deformkit.deform_conv_transpose2d` for the formula and the shapes.

    The bias, which is added to the result, is left out.
    """
    batch, channels, *size = input.shape
    _, group_channels, *kernel_size = weight.shape
    axes, taps = len(size), prod(kernel_size)
    out_channels, positions = groups * group_channels, prod(size)
    out_size = transposed_output_size(size, kernel_size, stride, padding, output_padding, dilation)
    offset_groups = offset.shape[1] // (taps * axes)
    dtype = compute_dtype(input.dtype)

    kernel = weight.to(dtype).reshape(groups, channels // groups, group_channels * taps).transpose(1, 2)
    field = input.to(dtype).reshape(batch, groups, channels // groups, positions)
    columns = torch.matmul(kernel, field)
    columns = columns.reshape(batch * offset_groups, out_channels // offset_groups, taps * positions)
    if mask is not None:
        columns = columns * mask.to(dtype).reshape(batch * offset_groups, 1, taps * positions)

    base = tap_grid(kernel_size, size, stride, padding, dilation, input.device).reshape(-1, axes)
    shift = offset.to(dtype).reshape(batch * offset_groups, taps, axes, positions).transpose(2, 3).flatten(1, 2)
    output = splat(columns, base, shift, out_size, boundary)
    return output.reshape(batch, out_channels, *out_size).to(input.dtype)
