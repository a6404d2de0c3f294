"""The definition of the deformable correlation, in tensor operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import level_samples


def deform_correlate(
    query: Tensor,
    key: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    num_points: Sequence[int],
    mode: str,
) -> Tensor:
    """Deformable correlation; see :func:`deformkit.deform_correlate` for the formula.

    Args:
        query: ``[B, Q, H*D]``.
        key: ``[B, S, H, D]``.
        spatial_shapes: the L * N sizes of the levels, level by level, each in tensor-axis order.
        sampling_locations: ``[B, Q, H, P, N]`` with the points of one level after those of another; x first.
        num_points: how many of the P points belong to each level.
        mode: ``"linear"`` or ``"nearest"``.

    Returns:
        ``[B, Q, H, P]``.
    """
    batch, _, heads, channels = key.shape
    # Per sample and head: [B*H, D, Q, 1].
    vectors = query.to(compute_dtype(query.dtype)).unflatten(2, (heads, channels)).permute(0, 2, 3, 1).flatten(0, 1)
    levels = level_samples(key, spatial_shapes, sampling_locations, num_points, mode)
    products = torch.cat([(samples * vectors.unsqueeze(-1)).sum(1) for samples in levels], -1)
    return products.unflatten(0, (batch, heads)).transpose(1, 2).to(query.dtype)
