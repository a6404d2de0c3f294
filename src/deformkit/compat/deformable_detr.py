"""Deformable DETR: its layer, its function and its ``autograd.Function``, as most of its descendants copied them."""

from typing import Any

from torch import Tensor

from .. import nn
from ..ops._levels import SpatialShapes
from ._attention import attend, check_level_start_index

__all__ = ["MSDeformAttn", "MSDeformAttnFunction", "ms_deform_attn_core_pytorch"]


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention, under the name of the function of Deformable DETR for debugging.

    See :func:`deformkit.ms_deform_attn`. Locations and weights may have another floating dtype than ``value``:
    locations are read as float32 (float64 beside a float64 value), weights in the dtype of ``value``.

    Args:
        value: ``[B, S, H, D]``: the levels, each flattened in row-major order, one after the other.
        value_spatial_shapes: ``[L, 2]``, the size (h, w) of each level; a tensor or a list.
        sampling_locations: ``[B, Q, H, L, P, 2]``, (x, y) from 0 to 1.
        attention_weights: ``[B, Q, H, L, P]``, used without a softmax.

    Returns:
        ``[B, Q, H*D]`` in the dtype of ``value``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or size does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> value, shapes = torch.randn(2, 32 * 48 + 16 * 24, 8, 16), torch.tensor([[32, 48], [16, 24]])
        >>> locations, weights = torch.rand(2, 100, 8, 2, 4, 2), torch.rand(2, 100, 8, 2, 4)
        >>> ms_deform_attn_core_pytorch(value, shapes, locations, weights).shape
        torch.Size([2, 100, 128])
    """
    return attend(value, value_spatial_shapes, None, sampling_locations, attention_weights)


class MSDeformAttnFunction:
    """The ``autograd.Function`` of Deformable DETR: only ``apply``, which is differentiable through the operator."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """:func:`ms_deform_attn_core_pytorch` with two more arguments.

        Args:
            value: the levels. Parameters that are not described here are as in
                :func:`ms_deform_attn_core_pytorch`.
            value_spatial_shapes: sizes of the levels.
            value_level_start_index: ``[L]``, where each level starts in ``value``. It follows from the sizes: an index
                on the CPU that contradicts them is an error; an index on another device is not read.
            sampling_locations: (x, y) from 0 to 1.
            attention_weights: of the points.
            im2col_step: has no effect.

        Example:
            >>> import torch
            >>> value, shapes = torch.randn(2, 1536, 8, 16), torch.tensor([[32, 48]])
            >>> locations, weights = torch.rand(2, 100, 8, 1, 4, 2), torch.rand(2, 100, 8, 1, 4)
            >>> MSDeformAttnFunction.apply(value, shapes, torch.tensor([0]), locations, weights, 64).shape
            torch.Size([2, 100, 128])
        """
        return attend(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)


class MSDeformAttn(nn.MSDeformAttn):
    """The layer of Deformable DETR: :class:`deformkit.nn.MSDeformAttn`, which also checks ``input_level_start_index``.

    The arguments, the initialisation and the state-dict are Deformable DETR's.

    Args:
        d_model: number of channels of queries, inputs and outputs.
        n_levels: L, the number of levels of the pyramid.
        n_heads: H, the number of heads, which must divide ``d_model``.
        n_points: P, the number of points of one head on one level.

    Shapes of ``forward(query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index,
    input_padding_mask=None)``: ``query [B, Q, d_model]``; ``reference_points [B, Q, L, 2]``, (x, y), or boxes
    ``[B, Q, L, 4]``; ``input_flatten [B, S, d_model]``; ``input_spatial_shapes [L, 2]``, (h, w);
    ``input_level_start_index [L]``, see :meth:`MSDeformAttnFunction.apply`; ``input_padding_mask [B, S]``, bool;
    output ``[B, Q, d_model]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = MSDeformAttn(64, n_levels=2, n_heads=4)
        >>> pyramid, shapes = torch.randn(2, 32 * 48 + 16 * 24, 64), torch.tensor([[32, 48], [16, 24]])
        >>> layer(torch.randn(2, 100, 64), torch.rand(2, 100, 2, 2), pyramid, shapes, torch.tensor([0, 1536])).shape
        torch.Size([2, 100, 64])
    """

    im2col_step = 64

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__(d_model, n_levels, n_heads, n_points)

    def _reset_parameters(self) -> None:
        # By this name the transformer of Deformable DETR calls it, and so do its descendants.
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Any = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the output for every query; see the class for shapes."""
        sizes = self._sizes(input_spatial_shapes)
        check_level_start_index(input_level_start_index, sizes)
        return super().forward(query, reference_points, input_flatten, sizes, None, input_padding_mask)
