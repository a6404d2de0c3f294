"""Multi-scale deformable attention: the public function, its checks, and the registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _script
from .._library import define
from .._script import scripts_as
from .._shape import (
    Mode,
    check_alike,
    check_floating,
    check_location_dtype,
    check_tensor,
    code_of,
    name_of,
    prod,
    times,
)
from .._suspect import warn_of_location_units
from . import reference

SpatialShapes = Tensor | Sequence[Sequence[int]] | Sequence[int]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@scripts_as(_script.ms_deform_attn)
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
            ``num_points``. On a CPU the first calls warn if the locations look like pixels or lie in -1 to 1; a check
            on a GPU would wait for the device.
        attention_weights: ``[B, Q, H, L, P]``, or ``[B, Q, H, P]`` with locations in the second form, in the dtype of
            ``value``. They are used as given, without a softmax.
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
    if sampling_locations.dim() not in (5, 6) or sampling_locations.shape[-1] not in (1, 2, 3):
        raise ValueError(
            f"sampling_locations has shape {list(sampling_locations.shape)}; it must be [B, Q, H, L, P, N] or "
            "[B, Q, H, P, N] with 1, 2 or 3 coordinates N"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights has shape {list(attention_weights.shape)}; with sampling_locations of shape "
            f"{list(sampling_locations.shape)} it must be {list(sampling_locations.shape[:-1])}"
        )
    axes = sampling_locations.shape[-1]
    sizes = level_sizes("spatial_shapes", spatial_shapes, axes, f"sampling_locations has {axes} coordinates")
    points = _points(num_points, sampling_locations, len(sizes))
    if sampling_locations.dim() == 6:
        sampling_locations, attention_weights = sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4)
    flat_sizes = [length for size in sizes for length in size]
    args = (value, flat_sizes, sampling_locations, attention_weights, points, code_of("mode", mode))
    _check(*args)
    warn_of_location_units(sampling_locations)
    return _operator(*args)


def level_sizes(name: str, spatial_shapes: SpatialShapes, axes: int, beside: str) -> list[list[int]]:
    """Convert ``spatial_shapes``, in any form that is accepted, to L lists of ``axes`` ints.

    Args:
        name: of the argument, for messages.
        spatial_shapes: see :func:`ms_deform_attn`.
        axes: the number of ints of each level.
        beside: the reason for this number, such as ``"sampling_locations has 2 coordinates"``.
    """
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dtype not in _INTEGERS:
            raise TypeError(f"{name} has dtype {spatial_shapes.dtype}; it must be an integer dtype")
        spatial_shapes = spatial_shapes.tolist()
    expected = "ints, or tuples of 1 int" if axes == 1 else f"tuples of {axes} ints"
    sizes: list[list[Any]] = []
    size: Any
    try:
        for size in spatial_shapes:
            row = [size] if axes == 1 and not hasattr(size, "__len__") else list(size)
            sizes.append([_integer(v) for v in row])
    except (TypeError, AttributeError):
        raise TypeError(f"{name} is {spatial_shapes!r}; it must be a sequence of {expected}") from None
    if not sizes:
        raise ValueError(f"{name} is empty; it needs at least one level")
    for row in sizes:
        if len(row) != axes:
            raise ValueError(f"{name} has {len(row)} columns; {beside}")
    return sizes


def _integer(value: Any) -> Any:
    # A symbolic int is returned as it is: to ask for its __index__ would fix its value.
    return value if isinstance(value, int | torch.SymInt) else int(value.__index__())


def _points(num_points: int | Sequence[int] | None, sampling_locations: Tensor, levels: int) -> list[int]:
    """The number of points on each level."""
    if sampling_locations.dim() == 6:
        if num_points is not None:
            raise ValueError(
                f"num_points is {num_points!r}; it must be None with sampling_locations [B, Q, H, L, P, N]"
            )
        if sampling_locations.shape[3] != levels:
            raise ValueError(
                f"sampling_locations has {sampling_locations.shape[3]} levels; spatial_shapes has {levels}"
            )
        return [sampling_locations.shape[4]] * levels
    if num_points is None:
        if levels > 1:
            raise ValueError(
                f"num_points is None; with sampling_locations [B, Q, H, P, N] and {levels} levels it must say "
                "how many of the P points belong to each level"
            )
        return [sampling_locations.shape[3]]
    try:
        points = [num_points] * levels if isinstance(num_points, int) else [_integer(n) for n in num_points]
    except (TypeError, AttributeError):
        raise TypeError(f"num_points is {num_points!r}; it must be an int or a sequence of ints") from None
    if len(points) != levels:
        raise ValueError(f"num_points is {num_points!r}, for {len(points)} levels; spatial_shapes has {levels}")
    return points


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
    for name, tensor, dim in (
        ("value", value, 4),
        ("sampling_locations", sampling_locations, 5),
        ("attention_weights", attention_weights, 4),
    ):
        check_alike(name, tensor, "value", value, dtype=name == "attention_weights")
        if tensor.dim() != dim:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have {dim} axes")
    check_location_dtype("sampling_locations", sampling_locations, "a value", value.dtype)
    name_of("mode", mode)

    batch, length, heads, channels = value.shape
    axes, levels = sampling_locations.shape[-1], len(num_points)
    if heads < 1 or channels < 1:
        raise ValueError(f"value has shape {list(value.shape)}; heads and channels must be at least 1")
    for name, tensor in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}; value has {batch}")
        if tensor.shape[2] != heads:
            raise ValueError(f"{name} has {tensor.shape[2]} heads; value has {heads}")
        if tensor.shape[1] != sampling_locations.shape[1] or tensor.shape[3] != sampling_locations.shape[3]:
            raise ValueError(
                f"{name} has {tensor.shape[1]} queries and {tensor.shape[3]} points; "
                f"sampling_locations has {sampling_locations.shape[1]} and {sampling_locations.shape[3]}"
            )
    if levels < 1 or axes not in (1, 2, 3) or len(spatial_shapes) != levels * axes:
        raise ValueError(
            f"spatial_shapes has {len(spatial_shapes)} sizes; num_points has {levels} levels and "
            f"sampling_locations {axes} coordinates"
        )
    sizes = [spatial_shapes[i : i + axes] for i in range(0, levels * axes, axes)]
    for size in sizes:
        if min(size) < 1:
            raise ValueError(f"spatial_shapes has a level of size {times(size)}; every size must be at least 1")
    if sum(prod(size) for size in sizes) != length:
        raise ValueError(
            f"spatial_shapes adds up to {sum(prod(size) for size in sizes)} = "
            f"{' + '.join(times(size) for size in sizes)} positions; value has {length}"
        )
    if min(num_points) < 0 or sum(num_points) < 1:
        raise ValueError(f"num_points is {list(num_points)}; each must be at least 0 and their sum at least 1")
    if sum(num_points) != sampling_locations.shape[3]:
        raise ValueError(
            f"num_points is {list(num_points)}, {sum(num_points)} in all; "
            f"sampling_locations has {sampling_locations.shape[3]} points"
        )
    return [batch, sampling_locations.shape[1], heads * channels]


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
