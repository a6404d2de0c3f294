"""The sampler in tensor operations: the definition with which every kernel is compared.

A point is kept as ``base + shift``: an integer and a real number. Its cell is ``base + floor(shift)`` and its fraction
``shift - floor(shift)``, so that a small shift keeps its precision however far from the origin it is applied.

The references are also what a model computes that is exported without its deformable operators. Hence no tensor that
they make has more than five axes, and they use only operations that other runtimes have.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate, product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _form
from .._shape import compute_dtype


def sample(field: Tensor, base: Tensor, shift: Tensor, boundary: str, mode: str = "linear") -> Tensor:
    """Multilinear interpolation of ``field`` at the points ``base + shift``.

    ``sample(field, p) = sum over the corners q of the cell around p of field[q] * prod_n (1 - |p_n - q_n|)``

    Args:
        field: ``[G, C, *S]`` with N spatial axes.
        base: integers, broadcastable to ``shift``; in tensor-axis order, in units of grid cells.
        shift: ``[G, *points, N]``, float32 or float64.
        boundary: ``"zeros"``: a corner outside the field counts 0. ``"border"``: the point is clamped into the field.
            ``"reflect"``: a corner outside is the one that it is mirrored to at the outer edges of the end cells, which
            has the value of the point mirrored there.
        mode: ``"linear"``; or ``"nearest"``: the value at ``floor(p + 1/2)``, with no derivative by the point.

    Returns:
        ``[G, C, *points]`` in the dtype of ``shift``. A NaN coordinate gives NaN, and NaN as the gradient of all the
        point's coordinates; it reads nothing of the field. Plus or minus infinity is outside. On a grid line the
        derivative is the one to the right. ``"reflect"`` clamps a shift to plus or minus 2^30, or twice the length of
        the axis if that is more.
    """
    groups, channels, *size = field.shape
    points = shift.shape[1:-1]
    if _form.current() == "gridsample" and len(size) == 2 and mode == "linear":
        return _grid_sample(field, base, shift, boundary).reshape(groups, channels, *points)
    flat = field.flatten(2).to(shift.dtype)

    result = _undefined(shift).unsqueeze(1)
    for index, inside, weight in _corners(size, base, shift, boundary, mode):
        where = index.flatten(1).unsqueeze(1).expand(-1, channels, -1)
        value = flat.gather(2, where).reshape(groups, channels, *points)
        result = result + value.masked_fill(~inside.unsqueeze(1), 0.0) * weight.unsqueeze(1)
    return result


def _grid_sample(field: Tensor, base: Tensor, shift: Tensor, boundary: str) -> Tensor:
    """:func:`sample` in two dimensions by torch's own function; undefined where a coordinate is not finite."""
    size = field.shape[2:]
    point = (base + shift).flatten(1, -2)
    grid = torch.stack([(point[..., axis] * 2 + 1) / size[axis] - 1 for axis in (1, 0)], -1).unsqueeze(2)
    padding = {"reflect": "reflection"}.get(boundary, boundary)
    return F.grid_sample(field.to(shift.dtype), grid, padding_mode=padding, align_corners=False)


def splat(
    values: Tensor, base: Tensor, shift: Tensor, size: Sequence[int], boundary: str, mode: str = "linear"
) -> Tensor:
    """The adjoint of :func:`sample`: add ``values`` to the corners of the cells around the points ``base + shift``.

    ``splat(values)[q] = sum over the points p with corner q of values[p] * prod_n (1 - |p_n - q_n|)``

    Args:
        values: ``[G, C, *points]`` in the dtype of ``shift``.
        base: as in :func:`sample`.
        shift: as in :func:`sample`.
        size: of the field.
        boundary: as in :func:`sample`.
        mode: as in :func:`sample`.

    Returns:
        ``[G, C, *size]`` in the dtype of ``shift``. A point with a NaN coordinate adds nothing, and the gradients by
        its value and its coordinates are NaN.
    """
    groups, channels = values.shape[:2]
    result = values.new_zeros(groups, channels, prod(size))
    for index, inside, weight in _corners(size, base, shift, boundary, mode):
        where = index.flatten(1).unsqueeze(1).expand(-1, channels, -1)
        # Where a coordinate is NaN the factor is, too: masked, it shows in the gradients alone.
        part = values * (weight + _undefined(shift)).unsqueeze(1)
        result = result.scatter_add(2, where, part.masked_fill(~inside.unsqueeze(1), 0.0).flatten(2))
    return result.unflatten(2, list(size))


def has_nan(points: Tensor) -> Tensor:
    """Whether a coordinate of ``points [..., N]`` is NaN, ``[...]``."""
    return reduce(torch.logical_or, (coordinate.isnan() for coordinate in points.unbind(-1)))


def _undefined(shift: Tensor) -> Tensor:
    """``[G, *points]``: NaN if a coordinate is NaN, else 0; the gradient is NaN by all coordinates of such a point."""
    undefined = has_nan(shift)
    mark = undefined.to(shift.dtype).masked_fill(undefined, torch.nan).unsqueeze(-1)
    return (shift.masked_fill(~undefined.unsqueeze(-1), 0.0) * mark).sum(-1)


def _corners(
    size: Sequence[int], base: Tensor, shift: Tensor, boundary: str, mode: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each corner of the cells: its index in the flattened field, whether it is there, and its weight."""
    undefined = has_nan(shift)
    lower, fraction = [], []
    step: list[Any] = []
    for axis, length in enumerate(size):
        first = base[..., axis]
        distance = shift[..., axis].masked_fill(undefined, 0.0)
        if boundary == "reflect":
            # To compare a symbolic length would limit the sizes that an exported model takes.
            limit = 2.0**30 if isinstance(length, torch.SymInt) else float(max(2**30, 2 * length))
            # Where a reflected shift is clamped, both corners are the same.
            step.append((distance >= -limit).logical_and(distance <= limit).to(torch.int64))
            distance = distance.clamp(-limit, limit)
        else:
            step.append(1)
            # Points farther than two cells outside are equivalent; the clamp keeps infinity out of the arithmetic.
            least, most = (0, length - 1) if boundary == "border" else (-2, length)
            low, high = (least - first).to(distance.dtype), (most - first).to(distance.dtype)
            distance = torch.where(distance < low, low, torch.where(distance > high, high, distance))
        if mode == "nearest":
            distance = (distance + 0.5).floor()
        whole = distance.floor()
        lower.append(first + whole.to(torch.int64))
        fraction.append(distance - whole)

    for corner in product((0,) if mode == "nearest" else (0, 1), repeat=len(size)):
        weight: Any = 1.0
        index: Any = 0
        inside = ~undefined
        for axis, (upper, length) in enumerate(zip(corner, size, strict=True)):
            coordinate = lower[axis] + upper * step[axis]
            if boundary == "border":
                coordinate = clamped(coordinate, length - 1)
            if boundary == "reflect":
                period = number(2 * length, coordinate)
                coordinate = coordinate.remainder(period)
                coordinate = torch.minimum(coordinate, period - 1 - coordinate)
            weight = weight * (fraction[axis] if upper else 1 - fraction[axis])
            inside = inside.logical_and(coordinate >= 0).logical_and(coordinate < length)
            index = index * length + coordinate
        yield index.masked_fill(~inside, 0), inside, weight


def number(value: float, like: Tensor) -> Tensor:
    """``value`` as a tensor without axes, because other runtimes combine few operations with a symbolic number."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def clamped(values: Tensor, bound: int) -> Tensor:
    """``values.clamp(0, bound)``, where ``bound`` may be symbolic."""
    limit = number(bound, values)
    return torch.where(values > limit, limit, values.masked_fill(values < 0, 0))


def level_samples(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, num_points: Sequence[int], mode: str
) -> Iterator[Tensor]:
    """The samples of attention, level by level: ``[B*H, D, Q, P_l]``; see :func:`deformkit.ms_deform_attn`.

    Args:
        value: ``[B, S, H, D]``.
        spatial_shapes: the L * N sizes of the levels, level by level, each in tensor-axis order.
        sampling_locations: ``[B, Q, H, P, N]`` with the points of one level after those of another; x first.
        num_points: how many of the P points belong to each level.
        mode: ``"linear"`` or ``"nearest"``.
    """
    axes, dtype = sampling_locations.shape[-1], compute_dtype(value.dtype)
    sizes = [list(spatial_shapes[i : i + axes]) for i in range(0, len(spatial_shapes), axes)]
    # Slices, because other runtimes do not split at symbolic places.
    fields, ends = value.permute(0, 2, 3, 1).flatten(0, 1), list(accumulate(map(prod, sizes)))
    # Per sample and head: [B*H, Q, P, N], in tensor-axis order.
    locations = sampling_locations.flip(-1).to(dtype).transpose(1, 2).flatten(0, 1).split(list(num_points), 2)
    for size, end, location in zip(sizes, ends, locations, strict=True):
        point = torch.stack([location[..., axis] * number(size[axis], location) for axis in range(axes)], -1)
        # A large number minus half a pixel may round to the same number, so its integer part is kept apart.
        whole = torch.stack([clamped(point[..., axis], size[axis]) for axis in range(axes)], -1).floor()
        base, shift = whole.nan_to_num(0.0).to(torch.int64), point - whole
        field = fields[..., end - prod(size) : end].unflatten(-1, size)
        if mode == "nearest":
            # The published rule is floor(location * size + 1/2).
            yield sample(field, base, shift, "border", "nearest")
        else:
            yield sample(field, base, shift - 0.5, "zeros")


def tap_grid(
    kernel_size: Sequence[int],
    out_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The points of a plain convolution, ``stride * o - padding + dilation * k``, as integers ``[K, *out, N]``."""
    steps = [torch.arange(n, device=device) * s - p for n, s, p in zip(out_size, stride, padding, strict=True)]
    taps = [torch.arange(k, device=device) * d for k, d in zip(kernel_size, dilation, strict=True)]
    origin, tap = (torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) for axes in (steps, taps))
    return origin + tap.reshape(-1, *[1] * len(out_size), len(out_size))
