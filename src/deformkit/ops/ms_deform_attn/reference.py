"""The definition of multi-scale deformable attention, in tensor operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import level_samples


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
    queries, dtype = sampling_locations.shape[1], compute_dtype(value.dtype)
    # Per sample and head: [B*H, Q, P].
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1).split(list(num_points), 2)
    output = torch.zeros(batch * heads, channels, queries, dtype=dtype, device=value.device)
    levels = level_samples(value, spatial_shapes, sampling_locations, num_points, mode)
    for samples, weight in zip(levels, weights, strict=True):
        output = output + (samples * weight.unsqueeze(1)).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
