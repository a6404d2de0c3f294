"""The sampler in Triton, and what the launchers of all rooms share; ``reference.py`` says what it computes.

In the kernels the rows of a tile are points and its columns are channels.

    base, shift    of a point, as (z, y, x): integers, and what is to be added to them
    size           of a field, as (D, H, W)
    known          rows that exist and have no NaN among their coordinates
    parts          of a tile: PARTS tensors [rows, columns], each with the next columns; every thread has one vector of
                   a row in each part, so that the more parts, the fewer threads work out what is known of that row

Two axes are three with D = 1 and z = 0, one axis has H = 1 too: RULE tells the compiler to leave the rest out.
A corner is a number from 0 to 2^axes - 1, whose bits say on which axes it is the upper one: x has the lowest bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shape import name_of, prod


class Strided(NamedTuple):
    """A tensor as kernels get it: where it begins, and its strides."""

    data: Any
    strides: tuple[int, ...]


class Rule(NamedTuple):
    """How points are read."""

    axes: int
    border: bool
    nearest: bool = False
    reflect: bool = False


class Steps(NamedTuple):
    """Where the taps of a kernel lie, each number for three axes."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]


class Sums(NamedTuple):
    """What kernels add the gradient of a field to; see :class:`FieldGradient`."""

    floats: Tensor
    units: Tensor | None
    per_one: Any

    def zero_(self) -> None:
        """Forget what was added."""
        self.floats.zero_()
        if self.units is not None:
            self.units.zero_()


class Field(NamedTuple):
    """In a kernel, for each row: its field's first position, and how far two positions lie apart in memory."""

    first: Any
    stride: Any
    size: Any


class Gradient(NamedTuple):
    """In a kernel: the gradient of a :class:`Field`, whose first position is an index into the sums."""

    sums: Any
    first: Any
    stride: Any


class Cell(NamedTuple):
    """In a kernel: the lower corner of each point's cell (int32), and how far the point lies beyond it (0 to 1).

    Where the field is reflected, the corner is one of the field followed by its mirror image, which are repeated.
    """

    corner: Any
    fraction: Any


class Columns(NamedTuple):
    """In a kernel: the columns of a tile, how far two lie apart in memory, and the end of them.

    The end is None where all of them exist.
    """

    index: Any
    stride: Any
    end: Any


@triton.constexpr_function
def total(counts):
    """The sum of numbers that the compiler knows."""
    return sum(counts)


@triton.constexpr_function
def product(counts):
    """The product of numbers that the compiler knows."""
    result = 1
    for count in counts:
        result *= count
    return result


@triton.jit
def read_size(size, RULE: tl.constexpr):
    """The (D, H, W) that :func:`packed` made ``size`` from."""
    one = tl.full((), 1, tl.int32)
    return size[0] >> 1 if RULE.axes > 2 else one, size[1] >> 1 if RULE.axes > 1 else one, size[2] >> 1


@triton.jit
def positions_of(size):
    """How many positions a size has."""
    return size[0] * size[1] * size[2]


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
    """The (z, y, x) of each row, in float32, from a number for each axis; two of them lie ``stride`` apart."""
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
    """Write (z, y, x) of each row, as :func:`coordinates` reads them."""
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
def furthest(size):
    """The distance that a shift is clamped to where a field of this length is reflected."""
    twice = 2.0 * size
    return tl.where(twice > 1073741824.0, twice, 1073741824.0)


@triton.jit
def locate_along(base, shift, size, RULE: tl.constexpr):
    """The cell of the point ``base + shift`` along one axis: its lower corner, and the fraction beyond it."""
    if RULE.reflect:
        far = tl.zeros_like(shift) + furthest(size)
        shift = tl.where(shift > -far, shift, -far)
        shift = tl.where(shift < far, shift, far)
        whole = tl.floor(shift)
        corner = (whole.to(tl.int64) + base) % (2 * size)
        return tl.where(corner < 0, corner + 2 * size, corner).to(tl.int32), shift - whole
    else:
        # Two cells beyond the field nothing changes any more; the clamp keeps infinity and NaN out of the arithmetic.
        low = tl.zeros_like(shift) + ((0 if RULE.border else -2) - base)
        high = tl.zeros_like(shift) + ((size - 1 if RULE.border else size) - base)
        shift = tl.where(shift > low, shift, low)
        shift = tl.where(shift < high, shift, high)
        whole = tl.floor(shift)
        return base + whole.to(tl.int32), shift - whole


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
    """1 where the point moves with its coordinate along one axis, 0 where it is clamped."""
    moved = tl.full(shift.shape, 1.0, tl.float32)
    if RULE.border:
        low = tl.zeros_like(shift) - base
        high = tl.zeros_like(shift) + (size - 1 - base)
        moved = tl.where((shift < low) | (shift > high), 0.0, moved)
    if RULE.reflect:
        moved = tl.where(tl.abs(shift) > furthest(size), 0.0, moved)
    return moved


@triton.jit
def slopes_of(derivatives, factor, base, shift, size, RULE: tl.constexpr):
    """The derivatives by the coordinates of a point, from those by the point at a factor of 1."""
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
def place_along(place, length, RULE: tl.constexpr):
    """Where a corner lies in the field along one axis, which may be outside."""
    if RULE.reflect:
        return tl.where(place < length, place, 2 * length - 1 - place)
    else:
        return place


@triton.jit
def lower_corner(cell, size, RULE: tl.constexpr):
    """The index in the field of each cell's lower corner, which may lie outside."""
    index = place_along(cell.corner[2], size[2], RULE)
    if RULE.axes > 1:
        index += place_along(cell.corner[1], size[1], RULE) * size[2]
    if RULE.axes > 2:
        index += place_along(cell.corner[0], size[0], RULE) * (size[1] * size[2])
    return index.to(tl.int64)


@triton.jit
def step_along(place, length, stride, UPPER: tl.constexpr, RULE: tl.constexpr):
    """How far the upper corner lies from the lower one along one axis, in elements of memory; 0 for the lower one."""
    step = stride * UPPER
    if RULE.border and UPPER:
        step = tl.where(place < length - 1, step, 0)
    if RULE.reflect and UPPER:
        back = tl.where((place >= length) & (place < 2 * length - 1), -step, 0)
        step = tl.where(place < length - 1, step, back)
    return step


@triton.jit
def step(cell, size, stride, CORNER: tl.constexpr, RULE: tl.constexpr):
    """How far a corner lies from the lower one, in elements of memory, where two positions lie ``stride`` apart."""
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
    # As unsigned numbers, those below 0 are above any length.
    return (place + UPPER).to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def inside(cell, size, known, CORNER: tl.constexpr, RULE: tl.constexpr):
    """Which of the ``known`` rows have this corner in the field."""
    if not RULE.border and not RULE.reflect:
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
    """The columns of one part of a tile, and which elements of it exist where ``mask`` says which rows do."""
    index = columns.index + PART * columns.index.shape[0]
    exists = mask[:, None]
    if columns.end is not None:
        exists = exists & (index < columns.end)[None, :]
    return index, exists


@triton.jit
def load_parts(rows, columns, mask, PARTS: tl.constexpr):
    """The parts of a tile whose rows begin at the pointers ``rows``; 0 where ``mask`` says so."""
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

    A row that is not known reads nothing and counts as 0: NaN for its factor makes it NaN.
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
    """The derivatives of ``sum(cotangent * factor * sample)``; those by the field are added to ``gradient``.

    ``cotangent`` is the parts of a tile, 0 where a row or a column does not exist. Nothing is added where there are no
    sums to add to.

    Returns, for each row, the derivative by ``factor``, and those by z, y and x at a factor of 1.
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
                # The sums are channels last: two columns are neighbours there.
                index_of_part, exists = of_part(columns, mask, PART)
                scatter(gradient.sums, where[:, None] + index_of_part[None, :], cotangent[PART] * weight, exists)
    if BY_POINT:
        return interpolated(dots, cell, RULE)
    else:
        nothing = tl.zeros_like(cell.fraction[2])
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
        self._dtype = like.dtype
        self.exact = wanted and torch.are_deterministic_algorithms_enabled()
        self.sums: Sums | None = None
        """What kernels add to, or None where the gradient is not wanted."""
        if wanted:
            units = like.new_zeros(shape, dtype=torch.int64) if self.exact else None
            # A power of two, so that the scaling itself is exact; one that float32 has.
            per_one = (62 - most().log2().ceil()).clamp(-100, 120).exp2().float() if self.exact else None
            self.sums = Sums(like.new_zeros(shape, dtype=torch.float32), units, per_one)

    @property
    def vector(self) -> int:
        """How many columns a thread best adds at once: 128 bits of them."""
        return 2 if self.exact else 4

    def result(self) -> Tensor | None:
        """The gradient, in the dtype of the field; None where it is not wanted."""
        if self.sums is None:
            return None
        floats, units, per_one = self.sums
        if units is not None:
            floats = units.double() / per_one + floats
        return floats.to(self._dtype)


def largest(value: Tensor) -> Tensor:
    """The largest finite magnitude in a tensor, in float64; 0 for an empty one."""
    magnitude = value.detach().abs()
    finite = magnitude.where(magnitude < torch.inf, 0.0).flatten()
    return torch.cat([finite, finite.new_zeros(1)]).amax().double()


def asked_for(grads: Sequence[Tensor | None], output_mask: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as a backward operator returns them: an empty tensor for each that there is not, or nobody asks for."""
    pairs = zip(grads, output_mask, strict=True)
    return tuple(grad if asked and grad is not None else like.new_empty(0) for grad, asked in pairs)


def strided(value: Tensor) -> Strided:
    """A tensor as kernels get it."""
    return Strided(value, value.stride())


def lifted(values: Sequence[int], missing: int) -> tuple[int, int, int]:
    """One to three values along the last axes as three: ``missing`` along those that there are not."""
    z, y, x = (*[missing] * (3 - len(values)), *values)
    return z, y, x


def packed(size: Sequence[int]) -> tuple[int, int, int]:
    """A size as kernels get it, for :func:`read_size`.

    Triton compiles anew for each set of numbers in a tuple that are 1, and that are multiples of 16: odd ones above 1
    are neither, so that a new image size is no new kernel.
    """
    z, y, x = (2 * length + 1 for length in lifted(size, 1))
    return z, y, x


def steps(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Steps:
    """The steps of a convolution as kernels get them."""
    return Steps(lifted(kernel_size, 1), lifted(stride, 1), lifted(padding, 0), lifted(dilation, 1))


def rule_of(axes: int, boundary: int, mode: int = 0) -> Rule:
    """The rule of an operator's arguments."""
    edge, nearest = name_of("boundary", boundary), name_of("mode", mode) == "nearest"
    return Rule(axes, border=edge == "border", nearest=nearest, reflect=edge == "reflect")


def largest_index(size: Sequence[int], out_size: Sequence[int], padding: Sequence[int] = ()) -> int:
    """The largest number that kernels keep in 32 bits for fields and outputs of these sizes."""
    padded = [length + 2 * p for length, p in zip(size, padding or [0] * len(size), strict=True)]
    return max(prod(size), prod(out_size), *padded, *packed(size), *packed(out_size))
