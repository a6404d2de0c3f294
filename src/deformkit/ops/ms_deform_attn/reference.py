"""The definition of multi-scale deformable attention, in tensor operations."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import sample


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    mode: str,
) -> Tensor:
    """Multi-scale deformable attention; see :func:`deformkit.ms_deform_attn` for the formula.

    Args:
        value: ``[B, S, H, D]``.
        spatial_shapes: the L * N sizes of the levels, level by level, each in tensor-axis order.
        sampling_locations: ``[B, Q, H, P, N]`` with the points of one level after those of another; x first.
        attention_weights: ``[B, Q, H, P]``.
        num_points: how many of the P points belong to each level.
        mode: ``"linear"`` or ``"nearest"``.

    Returns:
        ``[B, Q, H*D]``.
    """
    batch, _, heads, channels = value.shape
    queries, axes = sampling_locations.shape[1], sampling_locations.shape[-1]
    dtype = compute_dtype(value.dtype)

    sizes = [list(spatial_shapes[i : i + axes]) for i in range(0, len(spatial_shapes), axes)]
    fields = value.permute(0, 2, 3, 1).flatten(0, 1).split([prod(size) for size in sizes], -1)
    # Per sample and head: [B*H, Q, P, N], in tensor-axis order, and [B*H, Q, P].
    locations = sampling_locations.flip(-1).to(dtype).transpose(1, 2).flatten(0, 1).split(list(num_points), 2)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1).split(list(num_points), 2)
    output = torch.zeros(batch * heads, channels, queries, dtype=dtype, device=value.device)
    for size, field, location, weight in zip(sizes, fields, locations, weights, strict=True):
        point = torch.stack([location[..., axis] * size[axis] for axis in range(axes)], -1)
        # A large number minus half a pixel may round to the same number, so its integer part is kept apart.
        whole = torch.stack([point[..., axis].detach().clamp(0, size[axis]) for axis in range(axes)], -1).floor()
        base, shift = whole.nan_to_num(0.0).to(torch.int64), point - whole
        field = field.unflatten(-1, size)
        if mode == "nearest":
            # The published rule is floor(location * size + 1/2).
            samples = sample(field, base, shift, "border", "nearest")
        else:
            samples = sample(field, base, shift - 0.5, "zeros")
        output = output + (samples * weight.unsqueeze(1)).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
