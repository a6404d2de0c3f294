"""The definition of deformable aggregation, in tensor operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import sample, tap_grid


def deform_aggregate(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
    boundary: str,
) -> Tensor:
    """Deformable aggregation; see :func:`deformkit.deform_aggregate` for the formula and the shapes."""
    axes = value.dim() - 3
    batch, *out_size, heads, taps, _ = offset.shape
    dtype = compute_dtype(value.dtype)

    ones = [1] * axes
    centre = torch.tensor([d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)], device=value.device)
    base = tap_grid(ones, out_size, stride, padding, ones, value.device) + centre
    from_centre = tap_grid(kernel_size, ones, ones, [0] * axes, dilation, value.device) - centre
    if remove_center:
        from_centre = torch.cat([from_centre[: taps // 2], from_centre[taps // 2 + 1 :]])

    by_head = offset.to(dtype).movedim(-3, 1).movedim(-2, 2).reshape(batch * heads, taps, *out_size, axes)
    shift = offset_scale * (from_centre + by_head)
    field = value.movedim(-2, 1).movedim(-1, 2).flatten(0, 1)
    factor = weight.to(dtype).movedim(-2, 1).movedim(-1, 2).reshape(batch * heads, 1, taps, *out_size)
    output = (sample(field, base, shift, boundary) * factor).sum(2)
    return output.unflatten(0, (batch, heads)).movedim(2, -1).movedim(1, -2).to(value.dtype)
