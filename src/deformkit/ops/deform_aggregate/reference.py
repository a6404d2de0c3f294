"""The definition of deformable aggregation, in tensor operations."""

from collections.abc import Sequence
from math import prod

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
    dtype, axes = compute_dtype(value.dtype), len(kernel_size)
    batch, *size, heads, channels = value.shape
    out_size = offset.shape[1:-3]
    # Per sample and head: [B*H, D, *S], [B*H, P, K, N] and [B*H, 1, P, K] for P output positions.
    field = value.flatten(1, axes).permute(0, 2, 3, 1).reshape(batch * heads, channels, *size)
    moved = offset.flatten(1, axes).to(dtype).transpose(1, 2).flatten(0, 1)
    factor = weight.flatten(1, axes).to(dtype).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    base = _positions(out_size, kernel_size, stride, padding, dilation, offset.device).reshape(-1, 1, axes)
    shift = offset_scale * (_from_centre(kernel_size, dilation, remove_center, offset.device) + moved)
    output = (sample(field, base, shift, boundary) * factor).sum(-1)
    output = output.reshape(batch, heads, channels, prod(out_size)).permute(0, 3, 1, 2)
    return output.to(value.dtype).reshape(batch, *out_size, heads, channels)


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
    base = _positions(offset.shape[1:-3], kernel_size, stride, padding, dilation, offset.device)
    from_centre = _from_centre(kernel_size, dilation, remove_center, offset.device)
    return base.unsqueeze(-2).unsqueeze(-2), offset_scale * (from_centre + offset)


def _positions(
    out_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The centres of the windows, ``[*out, N]``."""
    ones, centre = [1] * len(kernel_size), _centre(kernel_size, dilation)
    before = [p - c for p, c in zip(padding, centre, strict=True)]
    return tap_grid(ones, out_size, stride, before, ones, device).squeeze(0)


def _from_centre(
    kernel_size: Sequence[int], dilation: Sequence[int], remove_center: bool, device: torch.device
) -> Tensor:
    """The taps of a window, counted from its centre, ``[K, N]``."""
    axes, taps = len(kernel_size), prod(kernel_size)
    ones = [1] * axes
    grid = tap_grid(kernel_size, ones, ones, _centre(kernel_size, dilation), dilation, device).reshape(-1, axes)
    return torch.cat([grid[: taps // 2], grid[taps // 2 + 1 :]]) if remove_center else grid


def _centre(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)]
