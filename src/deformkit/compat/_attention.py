"""Multi-scale deformable attention with the arguments that host libraries use, forward and backward."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..ops import ms_deform_attn
from ..ops._levels import SpatialShapes, level_sizes
from ..ops._shape import check_floating, check_tensor, code_of, compute_dtype, prod
from ..ops._suspect import readable
from ._autocast import without_autocast
from ._gradient import checked_gradient


def attend(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """:func:`deformkit.ms_deform_attn` of images, where locations and weights may have any floating dtype.

    Args:
        value: ``[B, S, H, D]``; its dtype is that of the output, under autocast too.
        spatial_shapes: ``[L, 2]``, the size (h, w) of each level.
        level_start_index: where each level starts in ``value``, see :func:`check_level_start_index`.
        sampling_locations: ``[B, Q, H, L, P, 2]``, (x, y) from 0 to 1; in half precision they are read as float32.
        attention_weights: ``[B, Q, H, L, P]``; computed with in the dtype of ``value``.

    Returns:
        ``[B, Q, H*D]``.
    """
    given = _arguments(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    with without_autocast(value):
        return ms_deform_attn(*given)


def attend_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
) -> list[Tensor]:
    """The gradients of :func:`attend` by value, locations and weights, each in the dtype of its tensor."""
    given = (value, sampling_locations, attention_weights)
    args = _arguments(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    value, sizes, locations, weights = args
    grad_output = checked_gradient(lambda *t: ms_deform_attn(t[0], sizes, *t[1:]), (value, *args[2:]), grad_output)
    grads = torch.ops.deformkit.ms_deform_attn_backward(
        grad_output,
        value,
        [length for size in sizes for length in size],
        locations.flatten(3, 4),
        weights.flatten(3, 4),
        [locations.shape[4]] * len(sizes),
        code_of("mode", "linear"),
        [True, True, True],
    )
    return [grad.reshape(tensor.shape).to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]


def check_level_start_index(level_start_index: Any, sizes: Sequence[Sequence[int]]) -> None:
    """Raise unless the levels lie one after the other, which is the only layout that the operator supports.

    A tensor on a device other than the CPU is not checked, because reading it would wait for the device.
    """
    if level_start_index is None:
        return
    if isinstance(level_start_index, Tensor):
        if not readable(level_start_index):
            return
        level_start_index = level_start_index.flatten().tolist()
    expected = [0, *accumulate(prod(size) for size in sizes)][:-1]
    if list(level_start_index) != expected:
        raise ValueError(
            f"level_start_index is {list(level_start_index)}; with levels of {[list(size) for size in sizes]} that lie "
            f"one after the other it must be {expected}"
        )


def _arguments(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, list[list[int]], Tensor, Tensor]:
    check_floating("value", value)
    check_tensor("sampling_locations", sampling_locations)
    check_tensor("attention_weights", attention_weights)
    if sampling_locations.dim() != 6 or sampling_locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations has shape {list(sampling_locations.shape)}; it must be [B, Q, H, L, P, 2]"
        )
    sizes = level_sizes("spatial_shapes", spatial_shapes, 2, "sampling_locations has 2 coordinates")
    check_level_start_index(level_start_index, sizes)
    locations = sampling_locations.to(compute_dtype(value.dtype))
    return value, sizes, locations, attention_weights.to(value.dtype)
