"""The definition of deformable sampling, in tensor operations."""

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import sample


def deform_sample(input: Tensor, points: Tensor, boundary: str, mode: str) -> Tensor:
    """Deformable sampling; see :func:`deformkit.deform_sample` for the formula.

    Args:
        input: ``[B, C, *S]`` with N spatial axes.
        points: ``[B, G, *out, N]`` in pixels, in tensor-axis order.
        boundary: ``"zeros"``, ``"border"`` or ``"reflect"``.
        mode: ``"linear"`` or ``"nearest"``.

    Returns:
        ``[B, C, *out]``.
    """
    batch, groups, *out_size, _ = points.shape
    channels, *size = input.shape[1:]
    fields = input.reshape(batch * groups, channels // groups, *size)
    shift = points.to(compute_dtype(input.dtype)).flatten(0, 1).flatten(1, -2)
    base = torch.zeros(points.shape[-1:], dtype=torch.int64, device=points.device)
    samples = sample(fields, base, shift, boundary, mode)
    return samples.reshape(batch, channels, *out_size).to(input.dtype)
