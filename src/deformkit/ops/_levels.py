"""Feature pyramids whose levels are flattened side by side, and the points that queries read on them: their checks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._shape import check_alike, check_location_dtype, name_of, prod, times

SpatialShapes = Tensor | Sequence[Sequence[int]] | Sequence[int]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def level_sizes(name: str, spatial_shapes: SpatialShapes, axes: int, beside: str) -> list[list[int]]:
    """Convert ``spatial_shapes``, in any form that is accepted, to L lists of ``axes`` ints.

    Args:
        name: of the argument, for messages.
        spatial_shapes: see :func:`deformkit.ms_deform_attn`.
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
            sizes.append([v if type(v) is int else _integer(v) for v in row])
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
    return value if isinstance(value, (int, torch.SymInt)) else int(value.__index__())


def located_levels(
    spatial_shapes: SpatialShapes, sampling_locations: Tensor, num_points: int | Sequence[int] | None
) -> tuple[list[list[int]], list[int]]:
    """The size of each level and its number of points, from ``sampling_locations`` in either form."""
    check_location_axes(sampling_locations)
    axes = sampling_locations.shape[-1]
    sizes = level_sizes("spatial_shapes", spatial_shapes, axes, f"sampling_locations has {axes} coordinates")
    return sizes, _points(num_points, sampling_locations, len(sizes))


def check_location_axes(sampling_locations: Tensor) -> None:
    """Raise a ValueError unless the locations have one of the two forms, and 1 to 3 coordinates."""
    if sampling_locations.dim() not in (5, 6) or sampling_locations.shape[-1] not in (1, 2, 3):
        raise ValueError(
            f"sampling_locations has shape {list(sampling_locations.shape)}; it must be [B, Q, H, L, P, N] or "
            "[B, Q, H, P, N] with 1, 2 or 3 coordinates N"
        )


def _points(num_points: int | Sequence[int] | None, sampling_locations: Tensor, levels: int) -> list[int]:
    """The number of points on each level."""
    if sampling_locations.dim() == 6:
        if num_points is not None:
            raise ValueError(
                f"num_points is {num_points!r}; it must be None with sampling_locations [B, Q, H, L, P, N]"
            )
        if sampling_locations.shape[3] not in (1, levels):
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


def over_heads_and_levels(tensor: Tensor, heads: int, levels: int, has_levels: bool) -> Tensor:
    """``tensor [B, Q, H, L, P, ...]``, if it ``has_levels``, or ``[B, Q, H, P, ...]``, in the second form.

    A single head is expanded to all heads, without a copy; a single level is copied to all levels before that.
    """
    if has_levels:
        if tensor.shape[3] == 1 and levels > 1:
            tensor = tensor.expand([-1, -1, -1, levels] + [-1] * (tensor.dim() - 4))
        tensor = tensor.flatten(3, 4)
    if tensor.shape[2] == 1 and heads > 1:
        tensor = tensor.expand([-1, -1, heads] + [-1] * (tensor.dim() - 3))
    return tensor


def check_levels(
    name: str,
    field: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    num_points: Sequence[int],
    mode: int,
) -> None:
    """Check levels and locations in the form that the operators take; ``field [B, S, H, D]`` is called ``name``."""
    for argument, tensor, dim in ((name, field, 4), ("sampling_locations", sampling_locations, 5)):
        check_alike(argument, tensor, name, field, dtype=False)
        if tensor.dim() != dim:
            raise ValueError(f"{argument} has shape {list(tensor.shape)}; it must have {dim} axes")
    check_location_dtype("sampling_locations", sampling_locations, f"a {name}", field.dtype)
    name_of("mode", mode)

    batch, length, heads, channels = field.shape
    axes, levels = sampling_locations.shape[-1], len(num_points)
    if heads < 1 or channels < 1:
        raise ValueError(f"{name} has shape {list(field.shape)}; heads and channels must be at least 1")
    check_counts("sampling_locations", sampling_locations, name, (batch, None, heads))
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
            f"{' + '.join(times(size) for size in sizes)} positions; {name} has {length}"
        )
    if min(num_points) < 0 or sum(num_points) < 1:
        raise ValueError(f"num_points is {list(num_points)}; each must be at least 0 and their sum at least 1")
    if sum(num_points) != sampling_locations.shape[3]:
        raise ValueError(
            f"num_points is {list(num_points)}, {sum(num_points)} in all; "
            f"sampling_locations has {sampling_locations.shape[3]} points"
        )


def check_counts(name: str, tensor: Tensor, leader_name: str, expected: Sequence[int | None]) -> None:
    """Raise a ValueError unless the first axes of a tensor, which are batch, queries and heads, have these lengths."""
    for axis, count in enumerate(expected):
        found = tensor.shape[axis]
        if count is not None and found != count:
            text = (f"batch size {found}", f"{found} queries", f"{found} heads")[axis]
            raise ValueError(f"{name} has {text}; {leader_name} has {count}")
