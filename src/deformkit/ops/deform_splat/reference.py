"""The definition of splatting, in tensor operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._shape import compute_dtype
from ..sample.reference import splat


def deform_splat(input: Tensor, points: Tensor, size: Sequence[int], boundary: str) -> Tensor:
    """Splatting; see :func:`deformkit.deform_splat` for the formula.

    Args:
        input: ``[B, C, *in]``.
        points: ``[B, G, *in, N]`` in pixels of the result, in tensor-axis order.
        size: of the result, N ints.
        boundary: ``"zeros"``, ``"border"`` or ``"reflect"``.

    Returns:
        ``[B, C, *size]``.
    """
    batch, groups = points.shape[:2]
    dtype = compute_dtype(input.dtype)
    values = input.to(dtype).flatten(2).unflatten(1, (groups, -1)).flatten(0, 1)
    base = torch.zeros(points.shape[-1:], dtype=torch.int64, device=points.device)
    fields = splat(values, base, points.to(dtype).flatten(0, 1).flatten(1, -2), size, boundary)
    return fields.reshape(batch, input.shape[1], *size).to(input.dtype)
