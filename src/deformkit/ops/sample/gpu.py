"""The sampler in Triton; ``reference.py`` defines what it computes, and ``gpu_launch.py`` makes its arguments.

In the kernels, the rows of a tile are points and its columns are channels.

    base, shift    of a point, as (z, y, x): integers, and the number to be added to each
    size           of a field, as (D, H, W)
    known          rows that exist and have no NaN among their coordinates
    parts          of a tile: PARTS tensors [rows, columns], each with the next columns. Every thread has one vector of
                   a row in each part: with more parts, fewer threads compute the quantities of that row

Two axes are three with D = 1 and z = 0; one axis has H = 1, too. RULE tells the compiler to omit the others.
A corner is a number from 0 to 2^axes - 1. Its bits are set for the axes on which it is the upper one; x is bit 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# The reference clamps a reflected shift to the first of these, or to twice the length of the axis. The second is the
# largest number that int32 and float32 share.
_FAR, _FARTHEST = tl.constexpr(float(2**30)), tl.constexpr(float(2**31 - 2**7))


class Strided(NamedTuple):
    """A tensor as an argument of kernels: its first element and its strides."""

    data: Any
    strides: tuple[int, ...]


class Rule(NamedTuple):
    """The rule by which points are sampled."""

    axes: int
    border: bool
    nearest: bool = False
    reflect: bool = False


class Steps(NamedTuple):
    """The window of a kernel, with three numbers for each property."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]


class Sums(NamedTuple):
    """The sums to which kernels add the gradient of a field; see ``FieldGradient`` in ``gpu_launch.py``."""

    floats: Tensor
    units: Tensor | None
    per_one: Any

    def zero_(self) -> None:
        """Reset the sums to zero."""
        self.floats.zero_()
        if self.units is not None:
            self.units.zero_()


class Field(NamedTuple):
    """In a kernel, for each row: the first position of its field, and the distance of two positions in memory."""

    first: Any
    stride: Any
    size: Any


class Gradient(NamedTuple):
    """In a kernel: the gradient of a :class:`Field`; its first position is an index into the sums."""

    sums: Any
    first: Any
    stride: Any


class Cell(NamedTuple):
    """In a kernel: the lower corner of each point's cell (int32), and the distance of the point from it (0 to 1).

    If the field is reflected, a corner is a position in the field followed by its mirror image, which repeat.
    """

    corner: Any
    fraction: Any


class Columns(NamedTuple):
    """In a kernel: the columns of a tile, their distance in memory, and their end.

    The end is None if all of them exist.
    """

    index: Any
    stride: Any
    end: Any


@triton.constexpr_function
def total(counts):
    """The sum of compile-time constants."""
    return sum(counts)


@triton.constexpr_function
def product(counts):
    """The product of compile-time constants."""
    result = 1
    for count in counts:
        result *= count
    return result


@triton.jit
def read_size(size, RULE: tl.constexpr):
    """The (D, H, W) from which :func:`packed` made ``size``."""
    one = tl.full((), 1, tl.int32)
    return size[0] >> 1 if RULE.axes > 2 else one, size[1] >> 1 if RULE.axes > 1 else one, size[2] >> 1


@triton.jit
def positions_of(size):
    """The number of positions of a size."""
    return size[0] * size[1] * size[2]


@triton.jit
def tile_rows(tile, positions, ROWS: tl.constexpr):
    """The rows of a tile: ROWS consecutive positions of one image.

    Returns the image (int64), and for each row its position and whether it exists.
    """
    tiles = tl.cdiv(positions, ROWS)
    # In the interpreter, the counter of a loop is not a tensor yet.
    image = (tl.zeros((), tl.int64) + tile) // tiles
    place = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    return image, place, place < positions


@triton.jit
def unravel(place, size, RULE: tl.constexpr):
    """The (z, y, x) of a position in row-major order."""
    z, y, x = tl.zeros_like(place), tl.zeros_like(place), place
    if RULE.axes > 1:
        y, x = place // size[2], place % size[2]
    if RULE.axes > 2:
        z, y = y // size[1], y % size[1]
    return z, y, x


@triton.jit
def coordinates(pointers, stride, mask, RULE: tl.constexpr, X_FIRST: tl.constexpr):
    """The (z, y, x) of each row in float32, from one number for each axis, which are ``stride`` apart."""
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    z, y, x = tl.zeros_like(first), tl.zeros_like(first), first
    if RULE.axes > 1:
        second = tl.load(pointers + stride, mask=mask, other=0.0).to(tl.float32)
        y, x = (second, first) if X_FIRST else (first, second)
    if RULE.axes > 2:
        third = tl.load(pointers + 2 * stride, mask=mask, other=0.0).to(tl.float32)
        z, y, x = (third, y, x) if X_FIRST else (y, x, third)
    return z, y, x


@triton.jit
def store_coordinates(pointers, stride, values, mask, RULE: tl.constexpr, X_FIRST: tl.constexpr):
    """Write (z, y, x) of each row in the layout of :func:`coordinates`."""
    z, y, x = values
    tl.store(pointers + (0 if X_FIRST else RULE.axes - 1) * stride, x, mask=mask)
    if RULE.axes > 1:
        tl.store(pointers + (1 if X_FIRST else RULE.axes - 2) * stride, y, mask=mask)
    if RULE.axes > 2:
        tl.store(pointers + (2 if X_FIRST else 0) * stride, z, mask=mask)


@triton.jit
def defined(shift):
    """Rows without a NaN among their coordinates."""
    z, y, x = shift
    return (z == z) & (y == y) & (x == x)


@triton.jit
def bounds(base, shift, size, RULE: tl.constexpr):
    """The least and the largest shift along one axis; beyond them, a point does not move with its shift."""
    if RULE.reflect:
        high = tl.zeros_like(shift) + tl.minimum(tl.maximum(2.0 * size, _FAR), _FARTHEST)
        return -high, high
    # Farther than two cells outside, nothing changes.
    low = tl.zeros_like(shift) + ((0 if RULE.border else -2) - base)
    high = tl.zeros_like(shift) + ((size - 1 if RULE.border else size) - base)
    return low, high


@triton.jit
def locate_along(base, shift, size, RULE: tl.constexpr):
    """The cell of the point ``base + shift`` along one axis: its lower corner, and the point's distance from it."""
    low, high = bounds(base, shift, size, RULE)
    # The clamp keeps infinity and NaN out of the arithmetic.
    shift = tl.where(shift > low, shift, low)
    shift = tl.where(shift < high, shift, high)
    whole = tl.floor(shift)
    place = whole.to(tl.int32)
    if RULE.reflect:
        # The sum of two numbers below 2^31 would not fit.
        place = wrapped(place, 2 * size) - 2 * size + wrapped(tl.zeros_like(place) + base, 2 * size)
        return tl.where(place < 0, place + 2 * size, place), shift - whole
    return base + place, shift - whole


@triton.jit
def wrapped(place, period):
    """``place`` modulo ``period``, which is not negative."""
    rest = place % period
    return tl.where(rest < 0, rest + period, rest)


@triton.jit
def locate(base, shift, size, RULE: tl.constexpr):
    """The :class:`Cell` of the point ``base + shift``."""
    x, fx = locate_along(base[2], shift[2], size[2], RULE)
    z, fz, y, fy = tl.zeros_like(x), tl.zeros_like(fx), tl.zeros_like(x), tl.zeros_like(fx)
    if RULE.axes > 1:
        y, fy = locate_along(base[1], shift[1], size[1], RULE)
    if RULE.axes > 2:
        z, fz = locate_along(base[0], shift[0], size[0], RULE)
    return Cell((z, y, x), (fz, fy, fx))


@triton.jit
def follows(base, shift, size, RULE: tl.constexpr):
    """1 if the point moves with its coordinate along one axis, 0 if it is clamped."""
    moved = tl.full(shift.shape, 1.0, tl.float32)
    if RULE.border or RULE.reflect:
        low, high = bounds(base, shift, size, RULE)
        moved = tl.where((shift < low) | (shift > high), 0.0, moved)
    return moved


@triton.jit
def slopes_of(derivatives, factor, base, shift, size, RULE: tl.constexpr):
    """The derivatives by the coordinates of a point, from those by the point with a factor of 1."""
    z, y, x = derivatives
    return (
        z * factor[0] * follows(base[0], shift[0], size[0], RULE),
        y * factor[1] * follows(base[1], shift[1], size[1], RULE),
        x * factor[2] * follows(base[2], shift[2], size[2], RULE),
    )


@triton.jit
def edge(fraction, UPPER: tl.constexpr):
    """The weight of a corner along one axis."""
    return fraction if UPPER else 1 - fraction


@triton.jit
def scatter(sums, where, amount, mask):
    """Add ``amount`` to the elements ``where`` of a :class:`Sums`."""
    if sums.units is not None:
        finite = tl.abs(amount) < float("inf")
        whole = (tl.where(finite, amount, 0.0) * tl.load(sums.per_one)).to(tl.int64)
        tl.atomic_add(sums.units + where, whole, mask=mask & finite, sem="relaxed")
        tl.atomic_add(sums.floats + where, amount, mask=mask & ~finite, sem="relaxed")
    else:
        tl.atomic_add(sums.floats + where, amount, mask=mask, sem="relaxed")


@triton.jit
def mirrored(place, length, RULE: tl.constexpr):
    """The position of a lower corner along one axis."""
    return tl.minimum(place, 2 * length - 1 - place) if RULE.reflect else place


@triton.jit
def lower_corner(cell, size, RULE: tl.constexpr):
    """The index in the field of each cell's lower corner, which may lie outside."""
    index = mirrored(cell.corner[2], size[2], RULE)
    if RULE.axes > 1:
        index += mirrored(cell.corner[1], size[1], RULE) * size[2]
    if RULE.axes > 2:
        index += mirrored(cell.corner[0], size[0], RULE) * (size[1] * size[2])
    return index.to(tl.int64)


@triton.jit
def step_along(place, length, stride, UPPER: tl.constexpr, RULE: tl.constexpr):
    """The distance of a corner from the lower one along one axis, in elements of memory; 0 for the lower one."""
    step = stride * UPPER
    if RULE.border and UPPER:
        step = tl.where(place < length - 1, step, 0)
    if RULE.reflect and UPPER:
        # At either end, the next position is the same one again; in the mirror image it is the one before.
        back = tl.where((place >= length) & (place < 2 * length - 1), -step, 0)
        step = tl.where(place < length - 1, step, back)
    return step


@triton.jit
def step(cell, size, stride, CORNER: tl.constexpr, RULE: tl.constexpr):
    """The distance of a corner from the lower one, in elements of memory, with positions that are ``stride`` apart."""
    far = step_along(cell.corner[2], size[2], stride, CORNER & 1, RULE)
    if RULE.axes > 1:
        line = size[2].to(tl.int64) * stride
        far += step_along(cell.corner[1], size[1], line, CORNER >> 1 & 1, RULE)
        if RULE.axes > 2:
            far += step_along(cell.corner[0], size[0], line * size[1], CORNER >> 2, RULE)
    return far


@triton.jit
def inside_along(place, length, UPPER: tl.constexpr):
    """Whether a corner lies in the field along one axis."""
    # As unsigned numbers, negative ones exceed any length.
    return (place + UPPER).to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def inside(cell, size, known, CORNER: tl.constexpr, RULE: tl.constexpr):
    """Which of the ``known`` rows have this corner in the field."""
    if not (RULE.border or RULE.reflect):
        known &= inside_along(cell.corner[2], size[2], CORNER & 1)
        if RULE.axes > 1:
            known &= inside_along(cell.corner[1], size[1], CORNER >> 1 & 1)
        if RULE.axes > 2:
            known &= inside_along(cell.corner[0], size[0], CORNER >> 2)
    return known


@triton.jit
def weighted(factor, cell, CORNER: tl.constexpr, RULE: tl.constexpr):
    """``factor`` times the weight of a corner in the interpolation."""
    if not RULE.nearest:
        if RULE.axes > 2:
            factor *= edge(cell.fraction[0], CORNER >> 2)
        if RULE.axes > 1:
            factor *= edge(cell.fraction[1], CORNER >> 1 & 1)
        factor *= edge(cell.fraction[2], CORNER & 1)
    return factor


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The parts of a tile, all 0."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return parts


@triton.jit
def of_part(columns, mask, PART: tl.constexpr):
    """The columns of one part of a tile, and the mask of its elements for the mask of its rows."""
    index = columns.index + PART * columns.index.shape[0]
    exists = mask[:, None]
    if columns.end is not None:
        exists = exists & (index < columns.end)[None, :]
    return index, exists


@triton.jit
def load_parts(rows, columns, mask, PARTS: tl.constexpr):
    """Load the parts of a tile whose rows begin at the pointers ``rows``; 0 where ``mask`` is False."""
    parts = ()
    for PART in tl.static_range(PARTS):
        index, exists = of_part(columns, mask, PART)
        values = tl.load(rows[:, None] + index[None, :] * columns.stride, mask=exists, other=0.0)
        parts = parts + (values.to(tl.float32),)
    return parts


@triton.jit
def store_parts(rows, columns, parts, mask):
    """Write the parts of a tile to rows that begin at the pointers ``rows``."""
    for PART in tl.static_range(len(parts)):
        index, exists = of_part(columns, mask, PART)
        tl.store(rows[:, None] + index[None, :] * columns.stride, parts[PART], mask=exists)


@triton.jit
def interpolate(result, field, columns, cell, factor, known, RULE: tl.constexpr):
    """The parts of ``result + factor * sample``.

    A row that is not known reads nothing and counts as 0; with a NaN factor it is NaN.
    """
    lower = field.first + lower_corner(cell, field.size, RULE) * field.stride
    for CORNER in tl.static_range(1 if RULE.nearest else 2**RULE.axes):
        rows = lower + step(cell, field.size, field.stride, CORNER, RULE)
        values = load_parts(rows, columns, inside(cell, field.size, known, CORNER, RULE), len(result))
        weight = weighted(factor, cell, CORNER, RULE)[:, None]
        sums = ()
        for PART in tl.static_range(len(result)):
            sums = sums + (result[PART] + values[PART] * weight,)
        result = sums
    return result


@triton.jit
def folded(values, fraction):
    """Pairs of values, interpolated along the axis with the lowest bit."""
    result = ()
    for i in tl.static_range(len(values) // 2):
        result = result + (values[2 * i] * (1 - fraction) + values[2 * i + 1] * fraction,)
    return result


@triton.jit
def differences(values):
    """Pairs of values, the upper one less the lower one."""
    result = ()
    for i in tl.static_range(len(values) // 2):
        result = result + (values[2 * i + 1] - values[2 * i],)
    return result


@triton.jit
def interpolated(corners, cell, RULE: tl.constexpr):
    """Interpolation of a number for each corner, and its derivatives by z, y and x."""
    value = corners[0]
    z, y, x = tl.zeros_like(value), tl.zeros_like(value), tl.zeros_like(value)
    fz, fy, fx = cell.fraction
    if not RULE.nearest:
        if RULE.axes == 1:
            x = differences(corners)[0]
            value = folded(corners, fx)[0]
        if RULE.axes == 2:
            lines = folded(corners, fx)
            x = folded(differences(corners), fy)[0]
            y = differences(lines)[0]
            value = folded(lines, fy)[0]
        if RULE.axes == 3:
            lines = folded(corners, fx)
            planes = folded(lines, fy)
            x = folded(folded(differences(corners), fy), fz)[0]
            y = folded(differences(lines), fz)[0]
            z = differences(planes)[0]
            value = folded(planes, fz)[0]
    return value, z, y, x


@triton.jit
def differentiate(cotangent, field, gradient, columns, cell, factor, known, RULE: tl.constexpr, BY_POINT: tl.constexpr):
    """Compute the derivatives of ``sum(cotangent * factor * sample)``; those by the field are added to ``gradient``.

    ``cotangent`` is the parts of a tile, 0 where a row or a column does not exist. Nothing is added if there are no
    sums to add to.

    Returns, for each row, the derivative by ``factor``, and those by z, y and x with a factor of 1.
    """
    index = lower_corner(cell, field.size, RULE)
    lower, first = field.first + index * field.stride, gradient.first + index * gradient.stride
    dots = ()
    for CORNER in tl.static_range(1 if RULE.nearest else 2**RULE.axes):
        mask = inside(cell, field.size, known, CORNER, RULE)
        if BY_POINT:
            rows = lower + step(cell, field.size, field.stride, CORNER, RULE)
            values = load_parts(rows, columns, mask, len(cotangent))
            products = values[0] * cotangent[0]
            for PART in tl.static_range(1, len(cotangent)):
                products += values[PART] * cotangent[PART]
            dots = dots + (tl.sum(products, 1),)
        if gradient.sums is not None:
            where = first + step(cell, field.size, gradient.stride, CORNER, RULE)
            weight = weighted(factor, cell, CORNER, RULE)[:, None]
            for PART in tl.static_range(len(cotangent)):
                # The sums are channels last, so that columns are adjacent.
                index_of_part, exists = of_part(columns, mask, PART)
                scatter(gradient.sums, where[:, None] + index_of_part[None, :], cotangent[PART] * weight, exists)
    if BY_POINT:
        return interpolated(dots, cell, RULE)
    else:
        nothing = tl.zeros_like(cell.fraction[2])
        return nothing, nothing, nothing, nothing
