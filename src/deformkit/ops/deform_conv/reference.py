"""The definition of deformable convolution, in tensor operations."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import sample, tap_grid


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    boundary: str,
) -> Tensor:
    """Deformable convolution; see :func:`deformkit.deform_conv2d` for the formula and the shapes."""
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel_size = weight.shape
    out_size = offset.shape[2:]
    axes, taps = len(size), prod(kernel_size)
    groups = channels // group_channels
    offset_groups = offset.shape[1] // (taps * axes)
    dtype = compute_dtype(input.dtype)

    base = tap_grid(kernel_size, out_size, stride, padding, dilation, input.device).reshape(-1, axes)
    shift = offset.to(dtype).reshape(batch * offset_groups, taps, axes, prod(out_size)).transpose(2, 3).flatten(1, 2)
    field = input.reshape(batch * offset_groups, channels // offset_groups, *size)
    columns = sample(field, base, shift, boundary)
    if mask is not None:
        columns = columns * mask.to(dtype).reshape(batch * offset_groups, 1, taps * prod(out_size))

    columns = columns.reshape(batch, groups, group_channels * taps, prod(out_size))
    kernel = weight.to(dtype).reshape(groups, out_channels // groups, group_channels * taps)
    output = torch.matmul(kernel, columns).reshape(batch, out_channels, *out_size)
    if bias is not None:
        output = output + bias.to(dtype).reshape(-1, *[1] * axes)
    return output.to(input.dtype)
