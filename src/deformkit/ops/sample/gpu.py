"""The sampler in Triton, and what the launchers of all rooms share; ``reference.py`` says what it computes.

In the kernels the rows of a tile are points and its columns are channels.

    base, shift    of a point, as (z, y, x): integers, and what is to be added to them
    size           of the field, as (D, H, W)
    point          (z, y, x, fz, fy, fx): the lower corner of its cell (int32) and how far it lies beyond it (0 to 1)
    known          rows that exist and have no NaN among their coordinates
    tile           (columns, distance of two columns in memory, number of columns that exist)
    parts          of a tile: PARTS tensors [rows, columns], each with the next columns; every thread has one vector of
                   a row in each part, so that the more parts, the fewer threads work out what is known of that row

Two axes are three with D = 1 and z = fz = 0, one axis has H = 1 too: AXES tells the compiler to leave the rest out.
A corner is a number from 0 to 2^AXES - 1, whose bits say on which axes it is the upper one: x has the lowest bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_rows(tile, positions, ROWS: tl.constexpr):
    """The rows of a tile: ROWS positions that follow one another in one image.

    Returns the image (int64), and for each row its position and whether there is one.
    """
    tiles = tl.cdiv(positions, ROWS)
    # A number that a loop counts is no tensor yet where the kernel is interpreted.
    image = (tl.zeros((), tl.int64) + tile) // tiles
    place = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    return image, place, place < positions


@triton.jit
def unravel(place, size, AXES: tl.constexpr):
    """The (z, y, x) of a position in row-major order."""
    z, y, x = tl.zeros_like(place), tl.zeros_like(place), place
    if AXES > 1:
        y, x = place // size[2], place % size[2]
    if AXES > 2:
        z, y = y // size[1], y % size[1]
    return z, y, x


@triton.jit
def coordinates(pointers, stride, mask, AXES: tl.constexpr, X_FIRST: tl.constexpr):
    """The (z, y, x) of each row, in float32, from AXES numbers that lie ``stride`` apart."""
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    z, y, x = tl.zeros_like(first), tl.zeros_like(first), first
    if AXES > 1:
        second = tl.load(pointers + stride, mask=mask, other=0.0).to(tl.float32)
        y, x = (second, first) if X_FIRST else (first, second)
    if AXES > 2:
        third = tl.load(pointers + 2 * stride, mask=mask, other=0.0).to(tl.float32)
        z, y, x = (third, y, x) if X_FIRST else (y, x, third)
    return z, y, x


@triton.jit
def store_coordinates(pointers, stride, values, mask, AXES: tl.constexpr, X_FIRST: tl.constexpr):
    """Write (z, y, x) of each row, as :func:`coordinates` reads them."""
    z, y, x = values
    tl.store(pointers + (0 if X_FIRST else AXES - 1) * stride, x, mask=mask)
    if AXES > 1:
        tl.store(pointers + (1 if X_FIRST else AXES - 2) * stride, y, mask=mask)
    if AXES > 2:
        tl.store(pointers + (2 if X_FIRST else 0) * stride, z, mask=mask)


@triton.jit
def defined(shift):
    """Rows without a NaN among their coordinates."""
    z, y, x = shift
    return (z == z) & (y == y) & (x == x)


@triton.jit
def locate_along(base, shift, size, BORDER: tl.constexpr):
    """The cell of the point ``base + shift`` along one axis: its lower corner, and the fraction beyond it."""
    # Two cells beyond the field nothing changes any more; the clamp keeps infinity and NaN out of the arithmetic.
    low = tl.zeros_like(shift) + ((0 if BORDER else -2) - base)
    high = tl.zeros_like(shift) + ((size - 1 if BORDER else size) - base)
    shift = tl.where(shift > low, shift, low)
    shift = tl.where(shift < high, shift, high)
    whole = tl.floor(shift)
    return base + whole.to(tl.int32), shift - whole


@triton.jit
def locate(base, shift, size, AXES: tl.constexpr, BORDER: tl.constexpr):
    """The cell of the point ``base + shift``."""
    x, fx = locate_along(base[2], shift[2], size[2], BORDER)
    z, fz, y, fy = tl.zeros_like(x), tl.zeros_like(fx), tl.zeros_like(x), tl.zeros_like(fx)
    if AXES > 1:
        y, fy = locate_along(base[1], shift[1], size[1], BORDER)
    if AXES > 2:
        z, fz = locate_along(base[0], shift[0], size[0], BORDER)
    return z, y, x, fz, fy, fx


@triton.jit
def follows(base, shift, size, BORDER: tl.constexpr):
    """1 where the point moves with its coordinate along one axis, 0 where it is clamped."""
    moved = tl.full(shift.shape, 1.0, tl.float32)
    if BORDER:
        low = tl.zeros_like(shift) - base
        high = tl.zeros_like(shift) + (size - 1 - base)
        moved = tl.where((shift < low) | (shift > high), 0.0, moved)
    return moved


@triton.jit
def edge(fraction, UPPER: tl.constexpr):
    """The weight of a corner along one axis."""
    return fraction if UPPER else 1 - fraction


@triton.jit
def scatter(gradient, where, amount, mask, EXACT: tl.constexpr):
    """Add ``amount`` to the sums of a :class:`FieldGradient`."""
    sums, units, per_one = gradient
    if EXACT:
        finite = tl.abs(amount) < float("inf")
        whole = (tl.where(finite, amount, 0.0) * tl.load(per_one)).to(tl.int64)
        tl.atomic_add(units + where, whole, mask=mask & finite, sem="relaxed")
        tl.atomic_add(sums + where, amount, mask=mask & ~finite, sem="relaxed")
    else:
        tl.atomic_add(sums + where, amount, mask=mask, sem="relaxed")


@triton.jit
def lower_corner(point, size, AXES: tl.constexpr):
    """The index in the field of each point's lower corner, which may lie outside."""
    index = point[2]
    if AXES > 1:
        index += point[1] * size[2]
    if AXES > 2:
        index += point[0] * (size[1] * size[2])
    return index.to(tl.int64)


@triton.jit
def step_along(place, length, stride, UPPER: tl.constexpr, BORDER: tl.constexpr):
    """How far the upper corner lies from the lower one along one axis, in elements of memory; 0 for the lower one."""
    step = stride * UPPER
    if BORDER and UPPER:
        step = tl.where(place < length - 1, step, 0)
    return step


@triton.jit
def step(point, size, stride, CORNER: tl.constexpr, AXES: tl.constexpr, BORDER: tl.constexpr):
    """How far a corner lies from the lower one, in elements of memory, where two positions lie ``stride`` apart."""
    far = step_along(point[2], size[2], stride, CORNER & 1, BORDER)
    if AXES > 1:
        line = size[2].to(tl.int64) * stride
        far += step_along(point[1], size[1], line, CORNER >> 1 & 1, BORDER)
        if AXES > 2:
            far += step_along(point[0], size[0], line * size[1], CORNER >> 2, BORDER)
    return far


@triton.jit
def inside_along(place, length, UPPER: tl.constexpr):
    """Whether a corner lies in the field along one axis."""
    # As unsigned numbers, those below 0 are above any length.
    return (place + UPPER).to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def inside(point, size, CORNER: tl.constexpr, AXES: tl.constexpr, BORDER: tl.constexpr, known):
    """Which of the ``known`` rows have this corner in the field."""
    if not BORDER:
        known &= inside_along(point[2], size[2], CORNER & 1)
        if AXES > 1:
            known &= inside_along(point[1], size[1], CORNER >> 1 & 1)
        if AXES > 2:
            known &= inside_along(point[0], size[0], CORNER >> 2)
    return known


@triton.jit
def weighted(factor, point, CORNER: tl.constexpr, AXES: tl.constexpr, NEAREST: tl.constexpr):
    """``factor`` times the weight of a corner in the interpolation."""
    if not NEAREST:
        if AXES > 2:
            factor *= edge(point[3], CORNER >> 2)
        if AXES > 1:
            factor *= edge(point[4], CORNER >> 1 & 1)
        factor *= edge(point[5], CORNER & 1)
    return factor


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The parts of a tile, all 0."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return parts


@triton.jit
def load_parts(rows, tile, mask, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """The parts of a tile whose rows begin at the pointers ``rows``; 0 where ``mask`` says so."""
    parts = ()
    for PART in tl.static_range(PARTS):
        columns, stride, count = tile
        columns += PART * columns.shape[0]
        exists = mask[:, None] if WHOLE else mask[:, None] & (columns < count)[None, :]
        values = tl.load(rows[:, None] + columns[None, :] * stride, mask=exists, other=0.0)
        parts = parts + (values.to(tl.float32),)
    return parts


@triton.jit
def store_parts(rows, tile, parts, mask, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """Write the parts of a tile to rows that begin at the pointers ``rows``."""
    for PART in tl.static_range(PARTS):
        columns = tile[0] + PART * tile[0].shape[0]
        exists = mask[:, None] if WHOLE else mask[:, None] & (columns < tile[2])[None, :]
        tl.store(rows[:, None] + columns[None, :] * tile[1], parts[PART], mask=exists)


@triton.jit
def interpolate(
    result,
    field,
    stride,
    tile,
    size,
    point,
    factor,
    known,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    NEAREST: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The parts of ``result + factor * sample``.

    ``field`` points, for each row, to the first position of its field; two positions lie ``stride`` apart. A row that
    is not known reads nothing and counts as 0: NaN for its factor makes it NaN.
    """
    lower = field + lower_corner(point, size, AXES) * stride
    for CORNER in tl.static_range(1 if NEAREST else 2**AXES):
        rows = lower + step(point, size, stride, CORNER, AXES, BORDER)
        values = load_parts(rows, tile, inside(point, size, CORNER, AXES, BORDER, known), PARTS, WHOLE)
        weight = weighted(factor, point, CORNER, AXES, NEAREST)[:, None]
        sums = ()
        for PART in tl.static_range(PARTS):
            sums = sums + (result[PART] + values[PART] * weight,)
        result = sums
    return result


@triton.jit
def folded(values, fraction, COUNT: tl.constexpr):
    """Pairs of values, interpolated along the axis with the lowest bit."""
    result = ()
    for i in tl.static_range(COUNT // 2):
        result = result + (values[2 * i] * (1 - fraction) + values[2 * i + 1] * fraction,)
    return result


@triton.jit
def differences(values, COUNT: tl.constexpr):
    """Pairs of values, the upper one less the lower one."""
    result = ()
    for i in tl.static_range(COUNT // 2):
        result = result + (values[2 * i + 1] - values[2 * i],)
    return result


@triton.jit
def interpolated(corners, point, AXES: tl.constexpr, NEAREST: tl.constexpr):
    """Interpolation of a number for each corner, and its derivatives by z, y and x."""
    value = corners[0]
    z, y, x = tl.zeros_like(value), tl.zeros_like(value), tl.zeros_like(value)
    if not NEAREST:
        if AXES == 1:
            x = differences(corners, 2)[0]
            value = folded(corners, point[5], 2)[0]
        if AXES == 2:
            lines = folded(corners, point[5], 4)
            x = folded(differences(corners, 4), point[4], 2)[0]
            y = differences(lines, 2)[0]
            value = folded(lines, point[4], 2)[0]
        if AXES == 3:
            lines = folded(corners, point[5], 8)
            planes = folded(lines, point[4], 4)
            x = folded(folded(differences(corners, 8), point[4], 4), point[3], 2)[0]
            y = folded(differences(lines, 4), point[3], 2)[0]
            z = differences(planes, 2)[0]
            value = folded(planes, point[3], 2)[0]
    return value, z, y, x


@triton.jit
def differentiate(
    cotangent,
    field,
    stride,
    gradient,
    gradient_first,
    gradient_stride,
    tile,
    size,
    point,
    factor,
    known,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    NEAREST: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The derivatives of ``sum(cotangent * factor * sample)``; those by the field are added to ``gradient``.

    ``cotangent`` is the parts of a tile, 0 where a row or a column does not exist. The gradient of a row's field begins
    at its element ``gradient_first``.

    Returns, for each row, the derivative by ``factor``, and those by z, y and x at a factor of 1.
    """
    index = lower_corner(point, size, AXES)
    lower, first = field + index * stride, gradient_first + index * gradient_stride
    dots = ()
    for CORNER in tl.static_range(1 if NEAREST else 2**AXES):
        mask = inside(point, size, CORNER, AXES, BORDER, known)
        if POINTS:
            values = load_parts(lower + step(point, size, stride, CORNER, AXES, BORDER), tile, mask, PARTS, WHOLE)
            products = values[0] * cotangent[0]
            for PART in tl.static_range(1, PARTS):
                products += values[PART] * cotangent[PART]
            dots = dots + (tl.sum(products, 1),)
        if FIELD:
            where = first + step(point, size, gradient_stride, CORNER, AXES, BORDER)
            weight = weighted(factor, point, CORNER, AXES, NEAREST)[:, None]
            for PART in tl.static_range(PARTS):
                columns = tile[0] + PART * tile[0].shape[0]
                exists = mask[:, None] if WHOLE else mask[:, None] & (columns < tile[2])[None, :]
                scatter(gradient, where[:, None] + columns[None, :], cotangent[PART] * weight, exists, EXACT)
    if POINTS:
        return interpolated(dots, point, AXES, NEAREST)
    else:
        nothing = tl.zeros_like(point[5])
        return nothing, nothing, nothing, nothing


class FieldGradient:
    """Where kernels add up the gradient of a field: in float32.

    Under deterministic algorithms finite amounts are added up as whole numbers of a small unit instead, in int64, where
    the order does not matter; what is not finite goes to the float32 sums, and stays what it is in any order.
    """

    def __init__(self, like: Tensor, shape: Sequence[int], wanted: bool, most: Callable[[], Tensor]) -> None:
        """Zeros for a gradient of ``shape``, where it is wanted.

        Args:
            like: gives device and dtype.
            shape: of the gradient, channels last.
            wanted: whether anything will be added.
            most: a bound of what the magnitudes added to one element can add up to: one number in float64.
        """
        self.wanted = wanted
        self.exact = wanted and torch.are_deterministic_algorithms_enabled()
        self._dtype = like.dtype
        self._sums = like.new_zeros(shape if wanted else 1, dtype=torch.float32)
        self._units = like.new_zeros(shape, dtype=torch.int64) if self.exact else None
        # A power of two, so that the scaling itself is exact; one that float32 has.
        self._per_one = (62 - most().log2().ceil()).clamp(-100, 120).exp2().float() if self.exact else 1.0

    @property
    def vector(self) -> int:
        """How many columns a thread best adds at once: 128 bits of them."""
        return 2 if self.exact else 4

    @property
    def argument(self) -> tuple[Tensor, Any, Any]:
        """What a kernel gets: the float32 sums, the sums in units, and how many units make one."""
        return self._sums, self._units, self._per_one

    def result(self) -> Tensor:
        """The gradient, in the dtype of the field; empty where it is not wanted."""
        if not self.wanted:
            return self._sums.new_empty(0, dtype=self._dtype)
        if self._units is None:
            return self._sums.to(self._dtype)
        return (self._units.double() / self._per_one + self._sums).to(self._dtype)


def largest(value: Tensor) -> Tensor:
    """The largest finite magnitude in a tensor, in float64; 0 for an empty one."""
    magnitude = value.detach().abs()
    finite = magnitude.where(magnitude < torch.inf, 0.0).flatten()
    return torch.cat([finite, finite.new_zeros(1)]).amax().double()


def lifted(values: Sequence[int], missing: int) -> tuple[int, int, int]:
    """One to three values along the last axes as three: ``missing`` along those that there are not."""
    z, y, x = (*[missing] * (3 - len(values)), *values)
    return z, y, x
