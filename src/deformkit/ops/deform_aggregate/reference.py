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
    dtype = compute_dtype(value.dtype)
    base, shift = points(offset.to(dtype), kernel_size, stride, padding, dilation, offset_scale, remove_center)
    axes = len(kernel_size)
    positions = list(range(1, axes + 1))
    field = value.permute(0, axes + 1, axes + 2, *positions).flatten(0, 1)
    columns = sample(
        field, base.squeeze(-3), shift.permute(0, axes + 1, *positions, axes + 2, axes + 3).flatten(0, 1), boundary
    )
    output = (columns * weight.to(dtype).permute(0, axes + 1, *positions, axes + 2).flatten(0, 1).unsqueeze(1)).sum(-1)
    return output.unflatten(0, (value.shape[0], value.shape[-2])).permute(0, *range(3, axes + 3), 1, 2).to(value.dtype)


def points(
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
) -> tuple[Tensor, Tensor]:
    """The points as a sum of integers ``[*out, 1, 1, N]`` and of shifts in the shape of ``offset``."""
    *out_size, _, taps, _ = offset.shape[1:]
    axes = len(kernel_size)
    ones = [1] * axes
    centre = [d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)]
    before = [p - c for p, c in zip(padding, centre, strict=True)]
    base = tap_grid(ones, out_size, stride, before, ones, offset.device).squeeze(0)
    from_centre = tap_grid(kernel_size, ones, ones, centre, dilation, offset.device).reshape(-1, axes)
    if remove_center:
        from_centre = torch.cat([from_centre[: taps // 2], from_centre[taps // 2 + 1 :]])
    return base.unsqueeze(-2).unsqueeze(-2), offset_scale * (from_centre + offset)
