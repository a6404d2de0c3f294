"""Multi-scale deformable attention: the public function, its checks, and the registration."""

from collections.abc import Sequence

from torch import Tensor

from .. import _script
from .._levels import (
    SpatialShapes,
    check_counts,
    check_levels,
    located_levels,
    over_heads_and_levels,
)
from .._library import define
from .._public import public
from .._shape import Mode, check_alike, check_floating, check_tensor, code_of
from .._suspect import warn_of_location_units
from . import reference


@public(_script.ms_deform_attn)
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    mode: Mode = "linear",
) -> Tensor:
    """Multi-scale deformable attention: every query samples a few points on every level of a feature pyramid.

    ``output[b, q, h] = sum over l, p of
    attention_weights[b, q, h, l, p] * sample(level_l[b, h], sampling_locations[b, q, h, l, p] * size_l - 1/2)``

    where ``level_l`` is the part of ``value`` that belongs to level l, as a map of ``size_l``, and ``sample`` is
    multilinear interpolation. The number of axes N, 1 to 3, is the length of the last axis of ``sampling_locations``.

    Args:
        value: ``[B, S, H, D]``: the levels, each flattened in row-major order, one after the other; float16, bfloat16,
            float32 or float64.
        spatial_shapes: the size of each level in tensor-axis order: L tuples of N ints, ``(h, w)`` for images, or L
            ints if N = 1; their products add up to S. A tensor ``[L, N]`` of integers is also accepted. Its values are
            read, so the call waits for its device and cannot be compiled. Sizes given as ``(w, h)`` cannot be detected,
            because their products are the same.
        sampling_locations: ``[B, Q, H, L, P, N]``, **x first**: ``(x, y)`` for images, ``(x, y, z)`` for volumes.
            Normalised: 0 is the outer edge of the first pixel of a level, 1 that of the last. float64 if ``value`` is
            float64, else float32, even if ``value`` is in half precision: a location in half precision may be off by
            more than a pixel. Or ``[B, Q, H, P, N]`` with the points of all levels one after the other, and
            ``num_points``. An axis H or L of length 1 is shared by all heads or levels; heads are not copied. On
            a CPU the first calls warn if the locations look like pixels or lie in -1 to 1; a check
            on a GPU would wait for the device.
        attention_weights: ``[B, Q, H, L, P]``, with H or L of length 1 in the same way, or ``[B, Q, H, P]`` with
            locations in the second form, in the dtype of ``value``. They are used as given, without a softmax.
        num_points: with locations in the second form, the number of points on each level, which may be 0, or one int
            for all levels.
        mode: ``"linear"``; or ``"nearest"``, called "discrete" in RT-DETRv2 and D-FINE: the pixel at
            ``floor(sampling_locations * size_l + 1/2)``, clamped into the level, without a gradient by the location.

    Returns:
        ``[B, Q, H*D]`` in the dtype of ``value``, accumulated in float32, or float64 for a float64 value. Pixels
        outside a level are 0. A NaN location gives NaN in the output of its head and in its gradient. A location at
        infinity is outside.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> shapes = [(32, 48), (16, 24)]
        >>> value = torch.randn(2, 32 * 48 + 16 * 24, 8, 16)
        >>> locations, weights = torch.rand(2, 100, 8, 2, 4, 2), torch.randn(2, 100, 8, 2 * 4).softmax(-1)
        >>> ms_deform_attn(value, shapes, locations, weights.unflatten(-1, (2, 4))).shape
        torch.Size([2, 100, 128])
        >>> ms_deform_attn(value, shapes, torch.rand(2, 100, 8, 5, 2), weights[..., :5], num_points=[3, 2]).shape
        torch.Size([2, 100, 128])

    Papers: Deformable DETR, https://arxiv.org/abs/2010.04159; RT-DETRv2, https://arxiv.org/abs/2407.17140.
    """
    check_tensor("value", value)
    check_tensor("sampling_locations", sampling_locations)
    check_tensor("attention_weights", attention_weights)
    sizes, points = located_levels(spatial_shapes, sampling_locations, num_points)
    has_levels = sampling_locations.dim() == 6
    _check_alike_but_for_single_axes(sampling_locations, attention_weights, has_levels)
    heads = value.shape[2] if value.dim() == 4 else 1
    sampling_locations, attention_weights = (
        over_heads_and_levels(tensor, heads, len(sizes), has_levels)
        for tensor in (sampling_locations, attention_weights)
    )
    flat_sizes = [length for size in sizes for length in size]
    args = (value, flat_sizes, sampling_locations, attention_weights, points, code_of("mode", mode))
    output = _operator.checked_call(*args)
    warn_of_location_units(sampling_locations)
    return output


def _check_alike_but_for_single_axes(sampling_locations: Tensor, attention_weights: Tensor, has_levels: bool) -> None:
    """Raise a ValueError unless the shapes agree, where one of the two may have one head or one level for all."""
    if attention_weights.shape == sampling_locations.shape[:-1]:
        return
    found, expected = list(attention_weights.shape), list(sampling_locations.shape[:-1])
    shared = (2, 3) if has_levels else (2,)
    fits = len(found) == len(expected) and all(
        a == b or (axis in shared and 1 in (a, b)) for axis, (a, b) in enumerate(zip(found, expected, strict=True))
    )
    if not fits:
        raise ValueError(
            f"attention_weights has shape {found}; with sampling_locations of shape "
            f"{list(sampling_locations.shape)} it must be {expected}"
        )


def _check(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    mode: int,
) -> list[int]:
    """Check every argument in the form that the operator takes; return the shape of the output."""
    check_floating("value", value)
    check_alike("sampling_locations", sampling_locations, "value", value, dtype=False)
    check_alike("attention_weights", attention_weights, "value", value)
    check_levels("value", value, spatial_shapes, sampling_locations, num_points, mode)
    batch, _, heads, channels = value.shape
    if attention_weights.dim() != 4:
        raise ValueError(f"attention_weights has shape {list(attention_weights.shape)}; it must have 4 axes")
    check_counts("attention_weights", attention_weights, "value", (batch, None, heads))
    queries, points = sampling_locations.shape[1], sampling_locations.shape[3]
    if attention_weights.shape[1] != queries or attention_weights.shape[3] != points:
        raise ValueError(
            f"attention_weights has {attention_weights.shape[1]} queries and {attention_weights.shape[3]} points; "
            f"sampling_locations has {queries} and {points}"
        )
    return [batch, queries, heads * channels]


_operator = define(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, "
    "int[] num_points, int mode) -> Tensor",
    gpu=f"{__package__}.gpu",
    reference=reference.ms_deform_attn,
    check=_check,
    differentiable=("value", "sampling_locations", "attention_weights"),
    coordinates=("sampling_locations",),
    batched=("value", "sampling_locations", "attention_weights"),
    rows={"grad_output": 1, "sampling_locations": 1, "attention_weights": 1},
)
