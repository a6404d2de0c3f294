"""Multi-scale deformable attention in Triton. A program takes some queries of one head; see ``sample/gpu.py``."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._shape import name_of
from ..gpu.launch import Config, launch, row_configs
from ..sample.gpu import (
    FieldGradient,
    coordinates,
    defined,
    differentiate,
    interpolate,
    largest,
    lifted,
    load_parts,
    locate,
    store_coordinates,
    store_parts,
    tile_rows,
    zeros,
)


@triton.jit
def level_of(point, sizes, NUM_POINTS: tl.constexpr):
    """The size of the level that a point belongs to, and the first of its positions.

    The sizes come as odd numbers: see :func:`_problem`.
    """
    D, H, W = sizes[0][0] // 2, sizes[0][1] // 2, sizes[0][2] // 2
    start = tl.zeros_like(W)
    first, end = 0, D * H * W
    for LEVEL in tl.static_range(1, len(NUM_POINTS)):
        first += NUM_POINTS[LEVEL - 1]
        here = point >= first
        d, h, w = sizes[LEVEL][0] // 2, sizes[LEVEL][1] // 2, sizes[LEVEL][2] // 2
        D, H, W = tl.where(here, d, D), tl.where(here, h, H), tl.where(here, w, W)
        start = tl.where(here, end, start)
        end += d * h * w
    return (D, H, W), start.to(tl.int64)


@triton.jit
def level_shift(pointers, stride, size, mask, AXES: tl.constexpr, NEAREST: tl.constexpr):
    """Where a location lies in a level, in positions; half a position on, where its lower corner is the nearest."""
    half: tl.constexpr = 0.5 if NEAREST else -0.5
    z, y, x = coordinates(pointers, stride, mask, AXES, True)
    return z * size[0] + half, y * size[1] + half, x * size[2] + half


@triton.jit(do_not_specialize=["queries"])
def ms_deform_attn_forward(
    value,
    sampling_locations,
    attention_weights,
    output,
    value_strides,
    location_strides,
    weight_strides,
    sizes,
    queries,
    heads,
    CHANNELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    POINTS_IN_ALL: tl.constexpr,
    AXES: tl.constexpr,
    NEAREST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = CHANNELS % (COLUMNS * PARTS) == 0
    split, program = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    head = program % heads
    image, query, exists = tile_rows(program // heads, queries, ROWS)
    tile = (split * COLUMNS * PARTS + tl.arange(0, COLUMNS), value_strides[3], CHANNELS)

    field = value + image * value_strides[0] + head * value_strides[2]
    row = query.to(tl.int64)
    locations = (
        sampling_locations + image * location_strides[0] + row * location_strides[1] + head * location_strides[2]
    )
    weights = attention_weights + image * weight_strides[0] + row * weight_strides[1] + head * weight_strides[2]
    result = zeros(ROWS, COLUMNS, PARTS)
    for point in tl.range(0, POINTS_IN_ALL, loop_unroll_factor=UNROLL):
        size, start = level_of(point, sizes, NUM_POINTS)
        shift = level_shift(locations + point * location_strides[3], location_strides[4], size, exists, AXES, NEAREST)
        known = defined(shift)
        factor = tl.load(weights + point * weight_strides[3], mask=exists, other=0.0).to(tl.float32)
        result = interpolate(
            result, field + start * value_strides[1], value_strides[1], tile, size,
            locate((0, 0, 0), shift, size, AXES, NEAREST), tl.where(known, factor, float("nan")), known & exists,
            AXES, NEAREST, NEAREST, PARTS, WHOLE,
        )  # fmt: skip
    output += ((image * queries + query) * heads + head) * CHANNELS
    store_parts(output, (tile[0], 1, CHANNELS), result, exists, PARTS, WHOLE)


@triton.jit(do_not_specialize=["queries", "length"])
def ms_deform_attn_backward(
    grad_output,
    value,
    sampling_locations,
    attention_weights,
    grad_value,
    grad_locations,
    grad_weights,
    grad_output_strides,
    value_strides,
    location_strides,
    weight_strides,
    sizes,
    queries,
    heads,
    length,
    CHANNELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    POINTS_IN_ALL: tl.constexpr,
    AXES: tl.constexpr,
    NEAREST: tl.constexpr,
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = CHANNELS % (COLUMNS * PARTS) == 0
    head = tl.program_id(0) % heads
    image, query, exists = tile_rows(tl.program_id(0) // heads, queries, ROWS)

    field = value + image * value_strides[0] + head * value_strides[2]
    first = (image * length * heads + head) * CHANNELS
    row = query.to(tl.int64)
    locations = (
        sampling_locations + image * location_strides[0] + row * location_strides[1] + head * location_strides[2]
    )
    weights = attention_weights + image * weight_strides[0] + row * weight_strides[1] + head * weight_strides[2]
    grad_output += image * grad_output_strides[0] + row * grad_output_strides[1] + head * grad_output_strides[2]
    result = ((image * queries + query) * heads + head) * POINTS_IN_ALL
    columns = tl.arange(0, COLUMNS)
    cotangent = load_parts(grad_output, (columns, grad_output_strides[3], CHANNELS), exists, PARTS, WHOLE)
    for point in tl.range(0, POINTS_IN_ALL, loop_unroll_factor=UNROLL):
        size, start = level_of(point, sizes, NUM_POINTS)
        shift = level_shift(locations + point * location_strides[3], location_strides[4], size, exists, AXES, NEAREST)
        known = defined(shift)
        factor = tl.load(weights + point * weight_strides[3], mask=exists, other=0.0).to(tl.float32)
        cell = locate((0, 0, 0), shift, size, AXES, NEAREST)
        amount = tl.where(known, 0.0, float("nan"))
        z, y, x = amount, amount, amount
        for split in tl.static_range(SPLITS):
            columns = split * COLUMNS * PARTS + tl.arange(0, COLUMNS)
            if split > 0:
                part = load_parts(grad_output, (columns, grad_output_strides[3], CHANNELS), exists, PARTS, WHOLE)
            else:
                part = cotangent
            by_factor, by_z, by_y, by_x = differentiate(
                part, field + start * value_strides[1], value_strides[1], grad_value,
                first + start * (heads * CHANNELS), heads * CHANNELS, (columns, value_strides[3], CHANNELS), size,
                cell, factor, known & exists, AXES, NEAREST, NEAREST, PARTS, WHOLE, FIELD, POINTS, EXACT,
            )  # fmt: skip
            amount, z, y, x = amount + by_factor, z + by_z, y + by_y, x + by_x
        if POINTS:
            slopes = (z * factor * size[0], y * factor * size[1], x * factor * size[2])
            tl.store(grad_weights + result + point, amount, mask=exists)
            store_coordinates(grad_locations + (result + point) * AXES, 1, slopes, exists, AXES, True)


def extent(value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, *_: object) -> int:
    """The largest number that kernels have to keep in 32 bits."""
    return max(2 * max(spatial_shapes) + 1, value.shape[1], sampling_locations.shape[1])


def forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    mode: int,
) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    tensors = [value, sampling_locations, attention_weights]
    numbers, constants = _problem(value, spatial_shapes, sampling_locations, num_points, mode)
    batch, queries, heads, channels = *sampling_locations.shape[:3], value.shape[3]
    output = value.new_empty(batch, queries, heads * channels)

    def programs(config: Config) -> int:
        splits = triton.cdiv(channels, config.blocks["COLUMNS"] * config.blocks["PARTS"])
        return batch * triton.cdiv(queries, config.blocks["ROWS"]) * heads * splits

    configs = row_configs(queries, batch * heads, channels, 16 // value.itemsize)
    args = [*tensors, output, *(t.stride() for t in tensors), *numbers]
    launch(ms_deform_attn_forward, programs, args, constants, configs)
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    mode: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    numbers, constants = _problem(value, spatial_shapes, sampling_locations, num_points, mode)
    batch, queries, heads, channels = *sampling_locations.shape[:3], value.shape[3]
    grad_output = grad_output.unflatten(2, (heads, channels))

    def most() -> Tensor:
        return largest(grad_output) * largest(attention_weights) * max(queries * attention_weights.shape[3], 1)

    grad_value = FieldGradient(value, value.shape, output_mask[0], most)
    by_points = any(output_mask[1:])
    grad_locations, grad_weights = (
        t.new_empty(t.shape if by_points else 0) for t in (sampling_locations, attention_weights)
    )
    constants |= {"FIELD": grad_value.wanted, "POINTS": by_points, "EXACT": grad_value.exact}
    if by_points or grad_value.wanted:
        tensors = [grad_output, value, sampling_locations, attention_weights]
        results = [grad_value.argument, grad_locations, grad_weights]
        launch(
            ms_deform_attn_backward,
            lambda config: batch * triton.cdiv(queries, config.blocks["ROWS"]) * heads,
            [*tensors, *results, *(t.stride() for t in tensors), *numbers, value.shape[1]],
            constants,
            row_configs(queries, batch * heads, channels, grad_value.vector),
        )
    grads = (grad_value.result(), grad_locations, grad_weights)
    return tuple(grad if asked else grad.new_empty(0) for grad, asked in zip(grads, output_mask, strict=True))


def _problem(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, num_points: Sequence[int], mode: int
) -> tuple[list[Any], dict[str, Any]]:
    """What both kernels are given besides tensors: numbers and constants."""
    queries, heads, _, axes = sampling_locations.shape[1:]
    levels = [lifted(spatial_shapes[i : i + axes], 1) for i in range(0, len(spatial_shapes), axes)]
    # Triton compiles anew for each set of numbers in a tuple that are 1, and that are multiples of 16: odd ones above
    # 1 are neither, so that a new image size is no new kernel.
    sizes = tuple(tuple(2 * length + 1 for length in level) for level in levels)
    constants = {
        "CHANNELS": value.shape[3],
        "NUM_POINTS": tuple(num_points),
        "POINTS_IN_ALL": sum(num_points),
        "AXES": axes,
        "NEAREST": name_of("mode", mode) == "nearest",
    }
    return [sizes, queries, heads], constants
