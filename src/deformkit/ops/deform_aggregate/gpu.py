"""Deformable aggregation in Triton. A program takes some output positions of one head; see ``sample/gpu.py``."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._shape import name_of, prod
from ..gpu.launch import Config, launch, row_configs
from ..sample.gpu import (
    FieldGradient,
    coordinates,
    defined,
    differentiate,
    follows,
    interpolate,
    largest,
    lifted,
    load_parts,
    locate,
    store_coordinates,
    store_parts,
    tile_rows,
    unravel,
    zeros,
)


@triton.jit
def tap_point(
    place,
    out_size,
    pointers,
    stride,
    mask,
    tap,
    offset_scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
    AXES: tl.constexpr,
):
    """Base and shift of the point that a tap reads for the output positions ``place``."""
    if REMOVE_CENTER:
        tap += tl.where(tap < KERNEL[0] * KERNEL[1] * KERNEL[2] // 2, 0, 1)
    az, ay, ax = unravel(place, out_size, AXES)
    oz, oy, ox = coordinates(pointers, stride, mask, AXES, False)
    bz, z = tap_along(az, oz, tap // (KERNEL[1] * KERNEL[2]), offset_scale, KERNEL, STRIDE, PADDING, DILATION, 0)
    by, y = tap_along(ay, oy, tap // KERNEL[2] % KERNEL[1], offset_scale, KERNEL, STRIDE, PADDING, DILATION, 1)
    bx, x = tap_along(ax, ox, tap % KERNEL[2], offset_scale, KERNEL, STRIDE, PADDING, DILATION, 2)
    return (bz, by, bx), (z, y, x)


@triton.jit
def tap_along(
    place,
    offset,
    tap,
    offset_scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Base and shift along one axis."""
    centre: tl.constexpr = DILATION[AXIS] * (KERNEL[AXIS] - 1) // 2
    return place * STRIDE[AXIS] + (centre - PADDING[AXIS]), offset_scale * (tap * DILATION[AXIS] - centre + offset)


@triton.jit(do_not_specialize=["positions", "D", "H", "W", "out_h", "out_w"])
def deform_aggregate_forward(
    value,
    offset,
    weight,
    output,
    value_strides,
    offset_strides,
    weight_strides,
    positions,
    D,
    H,
    W,
    out_h,
    out_w,
    heads,
    offset_scale,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = CHANNELS % (COLUMNS * PARTS) == 0
    split, program = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    head = program % heads
    image, place, exists = tile_rows(program // heads, positions, ROWS)
    tile = (split * COLUMNS * PARTS + tl.arange(0, COLUMNS), value_strides[3], CHANNELS)
    size, out_size = (D, H, W), (D, out_h, out_w)

    field = value + image * value_strides[0] + head * value_strides[2]
    row = place.to(tl.int64)
    offset += image * offset_strides[0] + row * offset_strides[1] + head * offset_strides[2]
    weight += image * weight_strides[0] + row * weight_strides[1] + head * weight_strides[2]
    result = zeros(ROWS, COLUMNS, PARTS)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        base, shift = tap_point(
            place, out_size, offset + tap * offset_strides[3], offset_strides[4], exists, tap, offset_scale,
            KERNEL, STRIDE, PADDING, DILATION, REMOVE_CENTER, AXES,
        )  # fmt: skip
        known = defined(shift)
        factor = tl.load(weight + tap * weight_strides[3], mask=exists, other=0.0).to(tl.float32)
        result = interpolate(
            result, field, value_strides[1], tile, size, locate(base, shift, size, AXES, BORDER),
            tl.where(known, factor, float("nan")), known & exists, AXES, BORDER, False, PARTS, WHOLE,
        )  # fmt: skip
    output += ((image * positions + place) * heads + head) * CHANNELS
    store_parts(output, (tile[0], 1, CHANNELS), result, exists, PARTS, WHOLE)


@triton.jit(do_not_specialize=["positions", "D", "H", "W", "out_h", "out_w"])
def deform_aggregate_backward(
    grad_output,
    value,
    offset,
    weight,
    grad_value,
    grad_offset,
    grad_weight,
    grad_output_strides,
    value_strides,
    offset_strides,
    weight_strides,
    positions,
    D,
    H,
    W,
    out_h,
    out_w,
    heads,
    offset_scale,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
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
    image, place, exists = tile_rows(tl.program_id(0) // heads, positions, ROWS)
    size, out_size = (D, H, W), (D, out_h, out_w)

    field = value + image * value_strides[0] + head * value_strides[2]
    first = (image * (D.to(tl.int64) * H * W) * heads + head) * CHANNELS
    row = place.to(tl.int64)
    offset += image * offset_strides[0] + row * offset_strides[1] + head * offset_strides[2]
    weight += image * weight_strides[0] + row * weight_strides[1] + head * weight_strides[2]
    grad_output += image * grad_output_strides[0] + row * grad_output_strides[1] + head * grad_output_strides[2]
    result = ((image * positions + place) * heads + head) * TAPS
    columns = tl.arange(0, COLUMNS)
    cotangent = load_parts(grad_output, (columns, grad_output_strides[3], CHANNELS), exists, PARTS, WHOLE)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        base, shift = tap_point(
            place, out_size, offset + tap * offset_strides[3], offset_strides[4], exists, tap, offset_scale,
            KERNEL, STRIDE, PADDING, DILATION, REMOVE_CENTER, AXES,
        )  # fmt: skip
        known = defined(shift)
        factor = tl.load(weight + tap * weight_strides[3], mask=exists, other=0.0).to(tl.float32)
        point = locate(base, shift, size, AXES, BORDER)
        amount = tl.where(known, 0.0, float("nan"))
        z, y, x = amount, amount, amount
        for split in tl.static_range(SPLITS):
            columns = split * COLUMNS * PARTS + tl.arange(0, COLUMNS)
            if split > 0:
                part = load_parts(grad_output, (columns, grad_output_strides[3], CHANNELS), exists, PARTS, WHOLE)
            else:
                part = cotangent
            by_factor, by_z, by_y, by_x = differentiate(
                part, field, value_strides[1], grad_value, first, heads * CHANNELS,
                (columns, value_strides[3], CHANNELS), size, point, factor, known & exists,
                AXES, BORDER, False, PARTS, WHOLE, FIELD, POINTS, EXACT,
            )  # fmt: skip
            amount, z, y, x = amount + by_factor, z + by_z, y + by_y, x + by_x
        if POINTS:
            factor *= offset_scale
            slopes = (
                z * factor * follows(base[0], shift[0], D, BORDER),
                y * factor * follows(base[1], shift[1], H, BORDER),
                x * factor * follows(base[2], shift[2], W, BORDER),
            )
            tl.store(grad_weight + result + tap, amount, mask=exists)
            store_coordinates(grad_offset + (result + tap) * AXES, 1, slopes, exists, AXES, False)


def extent(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *_: object,
) -> int:
    """The largest number that kernels have to keep in 32 bits."""
    size, out_size = value.shape[1:-2], offset.shape[1:-3]
    return max(prod(size), prod(out_size), *(s + 2 * p for s, p in zip(size, padding, strict=True)))


def forward(value: Tensor, offset: Tensor, weight: Tensor, *steps: Any) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    batch, positions, heads, channels = len(value), prod(offset.shape[1:-3]), *value.shape[-2:]
    tensors, strides, numbers, constants = _problem(value, offset, weight, *steps)
    output = value.new_empty(*offset.shape[:-3], heads, channels)

    def programs(config: Config) -> int:
        splits = triton.cdiv(channels, config.blocks["COLUMNS"] * config.blocks["PARTS"])
        return batch * triton.cdiv(positions, config.blocks["ROWS"]) * heads * splits

    configs = row_configs(positions, batch * heads, channels, 16 // value.itemsize)
    launch(deform_aggregate_forward, programs, [*tensors, output, *strides, *numbers], constants, configs)
    return output


def backward(grad_output: Tensor, value: Tensor, offset: Tensor, weight: Tensor, *steps: Any) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    *steps, output_mask = steps
    batch, positions, heads, channels = len(value), prod(offset.shape[1:-3]), *value.shape[-2:]
    tensors, strides, numbers, constants = _problem(value, offset, weight, *steps)
    grad_output = grad_output.flatten(1, -3)

    def most() -> Tensor:
        return largest(grad_output) * largest(weight) * max(prod(weight.shape[1:-2]) * weight.shape[-1], 1)

    grad_value = FieldGradient(value, value.shape, output_mask[0], most)
    by_points = any(output_mask[1:])
    grad_offset, grad_weight = (t.new_empty(t.shape if by_points else 0) for t in (offset, weight))
    constants |= {"FIELD": grad_value.wanted, "POINTS": by_points, "EXACT": grad_value.exact}
    if by_points or grad_value.wanted:
        results = [grad_value.argument, grad_offset, grad_weight]
        launch(
            deform_aggregate_backward,
            lambda config: batch * triton.cdiv(positions, config.blocks["ROWS"]) * heads,
            [grad_output, *tensors, *results, grad_output.stride(), *strides, *numbers],
            constants,
            row_configs(positions, batch * heads, channels, grad_value.vector, most_parts=4 if grad_value.exact else 8),
        )
    grads = (grad_value.result(), grad_offset, grad_weight)
    return tuple(grad if asked else grad.new_empty(0) for grad, asked in zip(grads, output_mask, strict=True))


def _problem(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
    boundary: int,
) -> tuple[list[Tensor], list[tuple[int, ...]], list[Any], dict[str, Any]]:
    """What both kernels are given: tensors with the spatial axes as one, their strides, numbers, constants."""
    *out_size, _, taps, axes = offset.shape[1:]
    size = value.shape[1:-2]
    tensors = [value.flatten(1, axes), offset.flatten(1, axes), weight.flatten(1, axes)]
    numbers = [prod(out_size), *lifted(size, 1), *lifted(out_size, 1)[1:], value.shape[-2], offset_scale]
    constants = {
        "CHANNELS": value.shape[-1],
        "TAPS": taps,
        "KERNEL": lifted(kernel_size, 1),
        "STRIDE": lifted(stride, 1),
        "PADDING": lifted(padding, 0),
        "DILATION": lifted(dilation, 1),
        "REMOVE_CENTER": remove_center,
        "AXES": axes,
        "BORDER": name_of("boundary", boundary) == "border",
    }
    return tensors, [t.stride() for t in tensors], numbers, constants
