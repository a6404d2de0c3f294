"""Deformable DETR: its layer, its function and its ``autograd.Function``, as most of its descendants copied them."""

from typing import Any

from torch import Tensor

from ..ops.ms_deform_attn.op import SpatialShapes
from ._attention import attend


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention, by the name of the slow function that Deformable DETR has for debugging.

    See :func:`deformkit.ms_deform_attn`. Locations and weights may have another floating dtype than ``value``:
    locations are read as float32 (float64 beside a float64 value), weights in value's dtype.

    Args:
        value: ``[B, S, H, D]``: the levels, each flattened in row-major order, one after the other.
        value_spatial_shapes: ``[L, 2]``, the size (h, w) of each level; a tensor or a list.
        sampling_locations: ``[B, Q, H, L, P, 2]``, (x, y) from 0 to 1.
        attention_weights: ``[B, Q, H, L, P]``, used as they are.

    Returns:
        ``[B, Q, H*D]`` in value's dtype.

    Raises:
        TypeError: an argument is no tensor, or has a wrong dtype.
        ValueError: a shape, device or size that does not fit, by name.

    Example:
        >>> import torch
        >>> value, shapes = torch.randn(2, 32 * 48 + 16 * 24, 8, 16), torch.tensor([[32, 48], [16, 24]])
        >>> locations, weights = torch.rand(2, 100, 8, 2, 4, 2), torch.rand(2, 100, 8, 2, 4)
        >>> ms_deform_attn_core_pytorch(value, shapes, locations, weights).shape
        torch.Size([2, 100, 128])
    """
    return attend(value, value_spatial_shapes, None, sampling_locations, attention_weights)


class MSDeformAttnFunction:
    """Where Deformable DETR calls its kernel: only ``apply``, which is differentiable through the operator itself."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """:func:`ms_deform_attn_core_pytorch` with two arguments more.

        Args:
            value: this, and all of which no more is said, as in :func:`ms_deform_attn_core_pytorch`.
            value_spatial_shapes: sizes of the levels.
            value_level_start_index: ``[L]``, where each level starts in ``value``. The sizes say so already; an index
                on the CPU that says something else is an error, one on another device is not read.
            sampling_locations: (x, y) from 0 to 1.
            attention_weights: of the points.
            im2col_step: has no meaning here.

        Example:
            >>> import torch
            >>> value, shapes = torch.randn(2, 1536, 8, 16), torch.tensor([[32, 48]])
            >>> locations, weights = torch.rand(2, 100, 8, 1, 4, 2), torch.rand(2, 100, 8, 1, 4)
            >>> MSDeformAttnFunction.apply(value, shapes, torch.tensor([0]), locations, weights, 64).shape
            torch.Size([2, 100, 128])
        """
        return attend(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
