"""Attention and aggregation in Triton: in every head, a query is a weighted sum of samples at its points.

The value is ``[B, S, H, D]``, where the S positions are those of all levels one after the other; coordinates are
``[B, Q, H, P, N]``, weights ``[B, Q, H, P]``, the output ``[B, Q, H, D]``. A room supplies PLACED, a function that
computes the points of a call::

    base, shift, slope = PLACED(stored, point, query, size, out_size, scale, RULE, SETTINGS)

``stored`` are the coordinates as (z, y, x); ``slope`` is the derivative of the shift by each of them.
A program computes some queries of one head; see ``gpu.py`` for the notation.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._shape import prod
from ..gpu.launch import Blocks, launch, row_configs
from .gpu import (
    Columns,
    Field,
    Gradient,
    Rule,
    coordinates,
    defined,
    differentiate,
    interpolate,
    load_parts,
    locate,
    read_size,
    slopes_of,
    store_coordinates,
    store_parts,
    tile_rows,
    total,
    zeros,
)
from .gpu_launch import FieldGradient, asked_for, largest, packed, strided


@triton.jit
def level_of(point, sizes, NUM_POINTS: tl.constexpr, RULE: tl.constexpr):
    """The size of the level of a point, and the first position of that level."""
    D, H, W = read_size(sizes[0], RULE)
    start = tl.zeros_like(W)
    first, end = 0, D * H * W
    for LEVEL in tl.static_range(1, len(NUM_POINTS)):
        first += NUM_POINTS[LEVEL - 1]
        here = point >= first
        d, h, w = read_size(sizes[LEVEL], RULE)
        D, H, W = tl.where(here, d, D), tl.where(here, h, H), tl.where(here, w, W)
        start = tl.where(here, end, start)
        end += d * h * w
    return (D, H, W), start.to(tl.int64)


@triton.jit
def at(tensor, image, row, head):
    """Pointers to the first elements of an image, a row and a head in a tensor."""
    return tensor.data + image * tensor.strides[0] + row * tensor.strides[1] + head * tensor.strides[2]


@triton.jit
def chunk_of(start, stride, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The columns of a tile from the channel ``start`` on."""
    end = None if CHANNELS % (COLUMNS * PARTS) == 0 else CHANNELS
    return Columns(start + tl.arange(0, COLUMNS), stride, end)


@triton.jit(do_not_specialize=["queries"])
def heads_forward(
    value, points, weights, output,
    sizes, queries, out_size, heads, scale,
    PLACED: tl.constexpr, SETTINGS: tl.constexpr, RULE: tl.constexpr, X_FIRST: tl.constexpr,
    NUM_POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    split, program = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    head = program % heads
    out_size = read_size(out_size, RULE)
    image, query, exists = tile_rows(program // heads, queries, ROWS)
    row = query.to(tl.int64)
    columns = chunk_of(split * COLUMNS * PARTS, value.strides[3], CHANNELS, COLUMNS, PARTS)

    field = value.data + image * value.strides[0] + head * value.strides[2]
    stored, factors = at(points, image, row, head), at(weights, image, row, head)
    result = zeros(ROWS, COLUMNS, PARTS)
    for point in tl.range(0, total(NUM_POINTS), loop_unroll_factor=UNROLL):
        size, start = level_of(point, sizes, NUM_POINTS, RULE)
        place = coordinates(stored + point * points.strides[3], points.strides[4], exists, RULE, X_FIRST)
        base, shift, _ = PLACED(place, point, query, size, out_size, scale, RULE, SETTINGS)
        known = defined(shift)
        factor = tl.load(factors + point * weights.strides[3], mask=exists, other=0.0).to(tl.float32)
        result = interpolate(
            result, Field(field + start * value.strides[1], value.strides[1], size), columns,
            locate(base, shift, size, RULE), tl.where(known, factor, float("nan")), known & exists, RULE,
        )  # fmt: skip
    output += ((image * queries + query) * heads + head) * CHANNELS
    store_parts(output, Columns(columns.index, 1, columns.end), result, exists)


@triton.jit(do_not_specialize=["queries", "length"])
def heads_backward(
    grad_output, value, points, weights, grad_value, grad_points, grad_weights,
    sizes, length, queries, out_size, heads, scale,
    PLACED: tl.constexpr, SETTINGS: tl.constexpr, RULE: tl.constexpr, X_FIRST: tl.constexpr,
    NUM_POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BY_POINT: tl.constexpr = grad_points is not None
    head = tl.program_id(0) % heads
    out_size = read_size(out_size, RULE)
    image, query, exists = tile_rows(tl.program_id(0) // heads, queries, ROWS)
    row = query.to(tl.int64)

    field = value.data + image * value.strides[0] + head * value.strides[2]
    first = (image * length * heads + head) * CHANNELS
    stored, factors = at(points, image, row, head), at(weights, image, row, head)
    cotangents, channel_stride = at(grad_output, image, row, head), grad_output.strides[3]
    result = ((image * queries + query) * heads + head) * total(NUM_POINTS)
    cotangent = load_parts(cotangents, chunk_of(0, channel_stride, CHANNELS, COLUMNS, PARTS), exists, PARTS)
    for point in tl.range(0, total(NUM_POINTS), loop_unroll_factor=UNROLL):
        size, start = level_of(point, sizes, NUM_POINTS, RULE)
        place = coordinates(stored + point * points.strides[3], points.strides[4], exists, RULE, X_FIRST)
        base, shift, slope = PLACED(place, point, query, size, out_size, scale, RULE, SETTINGS)
        known = defined(shift)
        factor = tl.load(factors + point * weights.strides[3], mask=exists, other=0.0).to(tl.float32)
        cell = locate(base, shift, size, RULE)
        level = Field(field + start * value.strides[1], value.strides[1], size)
        gradient = Gradient(grad_value, first + start * (heads * CHANNELS), heads * CHANNELS)
        amount = tl.where(known, 0.0, float("nan"))
        z, y, x = amount, amount, amount
        for begin in tl.static_range(0, CHANNELS, COLUMNS * PARTS):
            if begin > 0:
                part = load_parts(
                    cotangents, chunk_of(begin, channel_stride, CHANNELS, COLUMNS, PARTS), exists, PARTS
                )  # fmt: skip
            else:
                part = cotangent
            by_factor, by_z, by_y, by_x = differentiate(
                part, level, gradient, chunk_of(begin, value.strides[3], CHANNELS, COLUMNS, PARTS), cell, factor,
                known & exists, RULE, BY_POINT,
            )  # fmt: skip
            amount, z, y, x = amount + by_factor, z + by_z, y + by_y, x + by_x
        if BY_POINT:
            slopes = slopes_of((z * factor, y * factor, x * factor), slope, base, shift, size, RULE)
            tl.store(grad_weights + result + point, amount, mask=exists)
            store_coordinates(grad_points + (result + point) * RULE.axes, 1, slopes, exists, RULE, X_FIRST)


class Heads:
    """A call of an operator with heads: its tensors and the other arguments, as both kernels take them."""

    def __init__(
        self,
        value: Tensor,
        points: Tensor,
        weights: Tensor,
        *,
        sizes: Sequence[Sequence[int]],
        num_points: Sequence[int],
        placed: Any,
        settings: Any,
        scale: float | None,
        rule: Rule,
        x_first: bool,
    ) -> None:
        """Describe a call.

        Args:
            value: the tensor ``[B, S, H, D]``.
            points: the coordinates ``[B, *out, H, P, N]``.
            weights: the weights ``[B, *out, H, P]``.
            sizes: the size of each level.
            num_points: the number of points of a query on each level.
            placed: the Triton function of the room.
            settings: further compile-time constants, for ``placed``.
            scale: a number for ``placed``, if it needs one.
            rule: the rule by which points are sampled.
            x_first: whether the coordinates of a point are (x, y, z).
        """
        self.value, self.points, self.weights = value, points, weights
        out_size = points.shape[1:-3]
        self.batch, self.queries, self.heads, self.channels = len(value), prod(out_size), *value.shape[2:]
        self.arguments = {
            "value": strided(value),
            "points": strided(points.flatten(1, -4)),
            "weights": strided(weights.flatten(1, -3)),
            "sizes": tuple(packed(size) for size in sizes),
            "queries": self.queries,
            "out_size": packed(out_size),
            "heads": self.heads,
            "scale": scale,
            "PLACED": placed,
            "SETTINGS": settings,
            "RULE": rule,
            "X_FIRST": x_first,
            "NUM_POINTS": tuple(num_points),
            "CHANNELS": self.channels,
        }

    def tiles(self, blocks: Blocks) -> int:
        """The number of tiles of queries of all heads."""
        return self.batch * triton.cdiv(self.queries, blocks["ROWS"]) * self.heads

    def forward(self) -> Tensor:
        """The weighted sums of the samples, ``[B, *out, H, D]``."""
        output = self.value.new_empty(*self.points.shape[:-2], self.channels)
        launch(
            heads_forward,
            self.value.device,
            lambda blocks: self.tiles(blocks) * triton.cdiv(self.channels, blocks["COLUMNS"] * blocks["PARTS"]),
            row_configs(self.queries, self.batch * self.heads, self.channels, 16 // self.value.itemsize),
            output=output,
            **self.arguments,
        )
        return output

    def backward(self, grad_output: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
        """The requested gradients by value, points and weights; ``grad_output`` is ``[B, Q, H, D]``."""
        points, weights = self.points, self.weights

        def most() -> Tensor:
            return largest(grad_output) * largest(weights) * max(self.queries * points.shape[-2], 1)

        grad_value = FieldGradient(self.value, self.value.shape, output_mask[0], most)
        most_parts = 4 if grad_value.exact else 8
        by_points = any(output_mask[1:])
        grads = [t.new_empty(t.shape) if by_points else None for t in (points, weights)]
        if any(output_mask):
            launch(
                heads_backward,
                self.value.device,
                self.tiles,
                row_configs(self.queries, self.batch * self.heads, self.channels, grad_value.vector, most_parts),
                grad_output=strided(grad_output),
                grad_value=grad_value.sums,
                grad_points=grads[0],
                grad_weights=grads[1],
                length=self.value.shape[1],
                **self.arguments,
            )
        return asked_for([grad_value.result(), *grads], output_mask, self.value)
