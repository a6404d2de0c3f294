"""Deformable RoI pooling in Triton. A program computes some bins of one RoI; see ``sample/gpu.py``.

In the kernels, the rows of a tile are bins of one RoI and its columns are channels.

    roi       (image, origin, length, samples)
    origin    start of each bin if it were the first of its RoI, as (z, y, x)
    length    of the RoI, in pixels, as (z, y, x)
    samples   number of samples in a bin, as (z, y, x)
    groups    cells of a RoI that have channels of their own, packed, or None if pooling is not position-sensitive

The fields of the groups follow one another in memory; an image has one field otherwise.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._shape import prod
from ..gpu.launch import Blocks, launch, row_configs
from ..sample.gpu import (
    Columns,
    Field,
    Gradient,
    Rule,
    coordinates,
    defined,
    differentiate,
    follows,
    interpolate,
    load_parts,
    locate,
    positions_of,
    read_size,
    store_coordinates,
    store_parts,
    unravel,
    zeros,
)
from ..sample.gpu_launch import FieldGradient, asked_for, largest, largest_index, lifted, packed, strided
from .reference import MOST_SAMPLES, cells_of

_MOST_SAMPLES = tl.constexpr(MOST_SAMPLES)


@triton.jit
def tile_bins(program, bins, ROWS: tl.constexpr):
    """The RoI (int64) of a tile, and for each row its bin and whether it exists."""
    tiles = tl.cdiv(bins, ROWS)
    place = program % tiles * ROWS + tl.arange(0, ROWS)
    return (program // tiles).to(tl.int64), place, place < bins


@triton.jit
def read_roi(rois, offset, roi, place, exists, images, out_size, scale, sampling_ratio, gamma, RULE: tl.constexpr):
    """A RoI, with the bins ``place``.

    A RoI of an image that does not exist is treated as if its corners were NaN: it reads nothing and gives NaN.
    """
    pointer, stride = rois.data + roi * rois.strides[0], rois.strides[1]
    index = tl.load(pointer)
    known = (index >= 0) & (index < images) & (index == tl.floor(index))
    image = tl.where(known, index, 0.0).to(tl.int64)
    scale = tl.where(known, scale, float("nan"))
    lz, ly, lx = coordinates(pointer + stride, stride, True, RULE, True)
    hz, hy, hx = coordinates(pointer + (1 + RULE.axes) * stride, stride, True, RULE, True)
    length = ((hz - lz) * scale, (hy - ly) * scale, (hx - lx) * scale)
    z, y, x = lz * scale - 0.5, ly * scale - 0.5, lx * scale - 0.5
    if offset is not None:
        pointers = offset.data + (roi * offset.strides[0] + place.to(tl.int64) * offset.strides[2])
        oz, oy, ox = coordinates(pointers, offset.strides[1], exists, RULE, True)
        z, y, x = z + gamma * length[0] * oz, y + gamma * length[1] * oy, x + gamma * length[2] * ox
    return image, (z, y, x), length, samples_in_bin(length, out_size, sampling_ratio, RULE)


@triton.jit
def samples_in_bin(length, out_size, sampling_ratio, RULE: tl.constexpr):
    """The number of samples of a bin, as (z, y, x)."""
    infinite = float("inf")
    finite = (tl.abs(length[0]) < infinite) & (tl.abs(length[1]) < infinite) & (tl.abs(length[2]) < infinite)
    x = samples_along(length[2], out_size[2], finite, sampling_ratio)
    z, y = tl.full(x.shape, 1, tl.int32), tl.full(x.shape, 1, tl.int32)
    if RULE.axes > 1:
        y = samples_along(length[1], out_size[1], finite, sampling_ratio)
    if RULE.axes > 2:
        z = samples_along(length[0], out_size[0], finite, sampling_ratio)
    return z, y, x


@triton.jit
def samples_along(length, bins, finite, sampling_ratio):
    """The number of samples of a bin along one axis."""
    # The division is exact, because an integer quotient that is a little too large would add a sample.
    cells = tl.ceil(tl.div_rn(length, bins.to(tl.float32)))
    cells = tl.where(cells > 0, cells, 0.0)
    cells = tl.where(cells < _MOST_SAMPLES, cells, 1.0 * _MOST_SAMPLES)
    # One sample propagates a NaN corner; no sample would hide it.
    return tl.where(sampling_ratio > 0, sampling_ratio, tl.where(finite, cells, 1.0).to(tl.int32))


@triton.jit
def sample_shift(sample, place, out_size, origin, length, samples, RULE: tl.constexpr):
    """The position of a sample of each bin, as (z, y, x)."""
    bz, by, bx = unravel(place, out_size, RULE)
    x = shift_along(origin[2], bx, sample % samples[2], samples[2], length[2], out_size[2])
    z, y = tl.zeros_like(x), tl.zeros_like(x)
    if RULE.axes > 1:
        y = shift_along(origin[1], by, sample // samples[2] % samples[1], samples[1], length[1], out_size[1])
    if RULE.axes > 2:
        z = shift_along(origin[0], bz, sample // (samples[2] * samples[1]), samples[0], length[0], out_size[0])
    return z, y, x


@triton.jit
def shift_along(origin, place, sample, samples, length, bins):
    """The position of a sample of each bin along one axis."""
    return origin + (place + (sample + 0.5) / samples) * (length / bins)


@triton.jit
def near_along(place, length, groups):
    """The rows whose samples count along one axis."""
    if groups is None:
        result = (place >= -1) & (place <= length)
    else:
        result = (place >= -0.5) & (place <= length - 0.5)
    return result


@triton.jit
def near(shift, size, groups, RULE: tl.constexpr):
    """The rows whose samples are at most one pixel outside the field, or half a pixel if there are groups."""
    z, y, x = shift
    result = near_along(x, size[2], groups)
    if RULE.axes > 1:
        result &= near_along(y, size[1], groups)
    if RULE.axes > 2:
        result &= near_along(z, size[0], groups)
    return result


@triton.jit
def count_along(origin, place, samples, length, bins, size, groups):
    """The number of samples of each bin that count along one axis."""
    count = tl.zeros_like(origin)
    for sample in range(0, samples):
        count += near_along(shift_along(origin, place, sample, samples, length, bins), size, groups).to(tl.float32)
    return count


@triton.jit
def samples_in_mean(place, out_size, origin, length, samples, size, groups, RULE: tl.constexpr):
    """The number of samples of each bin over which the mean is taken."""
    if groups is None:
        result = positions_of(samples)
    else:
        bz, by, bx = unravel(place, out_size, RULE)
        zero = tl.zeros(place.shape, tl.float32)
        result = count_along(origin[2] + zero, bx, samples[2], length[2], out_size[2], size[2], groups)
        if RULE.axes > 1:
            result *= count_along(origin[1] + zero, by, samples[1], length[1], out_size[1], size[1], groups)
        if RULE.axes > 2:
            result *= count_along(origin[0] + zero, bz, samples[0], length[0], out_size[0], size[0], groups)
        result = tl.where(result > 1, result, 1.0)
    return result


@triton.jit
def field_of_bin(place, out_size, image, groups, RULE: tl.constexpr):
    """The number of the field that each bin reads."""
    field = image
    if groups is not None:
        cells = read_size(groups, RULE)
        bz, by, bx = unravel(place, out_size, RULE)
        cell = bz * cells[0] // out_size[0] * cells[1] + by * cells[1] // out_size[1]
        field = image * positions_of(cells) + cell * cells[2] + bx * cells[2] // out_size[2]
    return field


@triton.jit(do_not_specialize=["depth", "height", "width", "images", "sampling_ratio"])
def deform_roi_pool_forward(
    input, rois, offset, output, depth, height, width, out_size, images, scale, sampling_ratio, gamma, groups,
    CHANNELS: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    END: tl.constexpr = None if CHANNELS % (COLUMNS * PARTS) == 0 else CHANNELS
    split, program = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    size, out_size = (depth, height, width), read_size(out_size, RULE)
    bins = positions_of(out_size)
    roi, place, exists = tile_bins(program, bins, ROWS)
    columns = split * COLUMNS * PARTS + tl.arange(0, COLUMNS)
    image, origin, length, samples = read_roi(
        rois, offset, roi, place, exists, images, out_size, scale, sampling_ratio, gamma, RULE
    )  # fmt: skip

    index = field_of_bin(place, out_size, image, groups, RULE)
    field = Field(input.data + index * input.strides[0], input.strides[1], size)
    count, mean = positions_of(samples), samples_in_mean(place, out_size, origin, length, samples, size, groups, RULE)
    result = zeros(ROWS, COLUMNS, PARTS)
    for sample in tl.range(0, count, loop_unroll_factor=UNROLL):
        shift = sample_shift(sample, place, out_size, origin, length, samples, RULE)
        result = interpolate(
            result, field, Columns(columns, input.strides[2], END), locate((0, 0, 0), shift, size, RULE),
            tl.where(defined(shift), 1.0 / mean, float("nan")), near(shift, size, groups, RULE) & exists, RULE,
        )  # fmt: skip
    # Bins are adjacent in the output, so the parts of a tile are written channel by channel.
    store_parts(output + (roi * CHANNELS * bins + place), Columns(columns, bins.to(tl.int64), END), result, exists)


@triton.jit(do_not_specialize=["depth", "height", "width", "images", "sampling_ratio", "bin_stride"])
def deform_roi_pool_backward(
    grad_output, bin_stride, input, rois, offset, grad_input, grad_offset,
    depth, height, width, out_size, images, scale, sampling_ratio, gamma, groups,
    CHANNELS: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BY_POINT: tl.constexpr = grad_offset is not None
    END: tl.constexpr = None if CHANNELS % (COLUMNS * PARTS) == 0 else CHANNELS
    size, out_size = (depth, height, width), read_size(out_size, RULE)
    bins = positions_of(out_size)
    roi, place, exists = tile_bins(tl.program_id(0), bins, ROWS)
    image, origin, length, samples = read_roi(
        rois, offset, roi, place, exists, images, out_size, scale, sampling_ratio, gamma, RULE
    )  # fmt: skip

    index = field_of_bin(place, out_size, image, groups, RULE)
    field = Field(input.data + index * input.strides[0], input.strides[1], size)
    first = index * (size[0].to(tl.int64) * size[1] * size[2]) * CHANNELS
    # If the compiler knew that bins are adjacent, it would load them so and transpose the amounts of every corner.
    rows = grad_output.data + (roi * grad_output.strides[0] + place.to(tl.int64) * bin_stride)
    count, mean = positions_of(samples), samples_in_mean(place, out_size, origin, length, samples, size, groups, RULE)
    z = tl.zeros((ROWS,), tl.float32)
    y, x = z, z
    for start in range(0, CHANNELS, COLUMNS * PARTS):
        columns = start + tl.arange(0, COLUMNS)
        cotangent = load_parts(rows, Columns(columns.to(tl.int64), grad_output.strides[1], END), exists, PARTS)
        for sample in tl.range(0, count, loop_unroll_factor=UNROLL):
            shift = sample_shift(sample, place, out_size, origin, length, samples, RULE)
            _, by_z, by_y, by_x = differentiate(
                cotangent, field, Gradient(grad_input, first, CHANNELS), Columns(columns, input.strides[2], END),
                locate((0, 0, 0), shift, size, RULE), 1.0 / mean, near(shift, size, groups, RULE) & exists,
                RULE, BY_POINT,
            )  # fmt: skip
            undefined = tl.where(defined(shift), 0.0, float("nan"))
            z += by_z * follows(0, shift[0], size[0], RULE) + undefined
            y += by_y * follows(0, shift[1], size[1], RULE) + undefined
            x += by_x * follows(0, shift[2], size[2], RULE) + undefined
    if BY_POINT:
        factor = gamma / tl.where(mean > 0, mean, 1)
        slopes = (z * (factor * length[0]), y * (factor * length[1]), x * (factor * length[2]))
        store_coordinates(grad_offset + roi * RULE.axes * bins + place, bins, slopes, exists, RULE, True)


def extent(input: Tensor, rois: Tensor, offset: Tensor | None, output_size: Sequence[int], *how: Any) -> int:
    """The largest number that kernels have to store in 32 bits."""
    cells = cells_of(how[-1])
    bins = [length * groups for length, groups in zip(output_size, cells, strict=True)] if cells else []
    return max(largest_index(input.shape[2:], output_size), prod(cells), *bins, 0)


def forward(input: Tensor, rois: Tensor, offset: Tensor | None, *how: Any) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    output_size, channels = how[0], input.shape[1] // prod(cells_of(how[-1]))
    output = input.new_empty(len(rois), channels, *output_size)
    launch(
        deform_roi_pool_forward,
        input.device,
        lambda blocks: _tiles(output, blocks) * triton.cdiv(channels, blocks["COLUMNS"] * blocks["PARTS"]),
        row_configs(prod(output_size), len(rois), channels, 16 // input.itemsize, most_parts=2),
        output=output,
        **_arguments(input, rois, offset, *how),
    )
    return output


def backward(grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *how: Any) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    *how, output_mask = how
    bins, field = prod(grad_output.shape[2:]), _fields(input, cells_of(how[-1]))

    def most() -> Tensor:
        return largest(grad_output) * max(len(rois) * bins, 1)

    grad_input = FieldGradient(input, field.shape, output_mask[0], most)
    grad_offset = offset.new_empty(offset.shape) if output_mask[1] and offset is not None else None
    if grad_input.sums is not None or grad_offset is not None:
        rows = grad_output.flatten(2)
        launch(
            deform_roi_pool_backward,
            input.device,
            lambda blocks: _tiles(grad_output, blocks),
            row_configs(bins, len(rois), field.shape[-1], grad_input.vector, most_parts=4),
            grad_output=strided(rows),
            bin_stride=rows.stride(2),
            grad_input=grad_input.sums,
            grad_offset=grad_offset,
            **_arguments(input, rois, offset, *how),
        )
    by_input = grad_input.result()
    if by_input is not None:
        by_input = by_input.movedim(-1, 1).reshape(input.shape).contiguous()
    return asked_for([by_input, grad_offset], output_mask, input)


def _fields(input: Tensor, group_size: Sequence[int]) -> Tensor:
    """The fields of all images with channels last: ``[B, *S, C]``, or ``[B, groups, *S, C]``."""
    if not group_size:
        return input.movedim(1, -1)
    groups = prod(group_size)
    return input.unflatten(1, (input.shape[1] // groups, groups)).movedim(1, -1)


def _tiles(output: Tensor, blocks: Blocks) -> int:
    return len(output) * triton.cdiv(prod(output.shape[2:]), blocks["ROWS"])


def _arguments(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    group_size: Sequence[int],
) -> dict[str, Any]:
    """The arguments of both kernels."""
    group_size = cells_of(group_size)
    field = _fields(input, group_size)
    if field.stride(-1) != 1 or group_size:
        field = field.contiguous()
    return {
        "input": strided(field.flatten(0, 1).flatten(1, -2) if group_size else field.flatten(1, -2)),
        "rois": strided(rois),
        "offset": None if offset is None else strided(offset.flatten(2)),
        # Separate arguments take no registers, unlike a packed size, and the loop over samples has none to spare.
        **dict(zip(("depth", "height", "width"), lifted(input.shape[2:], 1), strict=True)),
        "out_size": packed(output_size),
        "images": len(input),
        "scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "gamma": gamma,
        "groups": packed(group_size) if group_size else None,
        "CHANNELS": field.shape[-1],
        "RULE": Rule(input.dim() - 2, border=True),
    }
