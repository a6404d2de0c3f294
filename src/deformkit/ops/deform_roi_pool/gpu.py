"""Deformable RoI pooling in Triton. A program takes some bins of one RoI; see ``sample/gpu.py``.

In the kernels the rows of a tile are bins of one RoI and its columns are channels.

    roi       (image, origin, length, samples)
    origin    where each bin would start if it were the first of its RoI, as (z, y, x)
    length    of the RoI, in pixels, as (z, y, x)
    samples   in a bin: how many, as (z, y, x)
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._shape import prod
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
    unravel,
    zeros,
)
from .reference import MOST_SAMPLES

_MOST_SAMPLES = tl.constexpr(MOST_SAMPLES)


@triton.jit
def tile_bins(program, bins, ROWS: tl.constexpr):
    """The RoI (int64) of a tile, its bins, and whether there is one, for each row."""
    tiles = tl.cdiv(bins, ROWS)
    place = program % tiles * ROWS + tl.arange(0, ROWS)
    return (program // tiles).to(tl.int64), place, place < bins


@triton.jit
def read_roi(
    roi, roi_stride, offset, offset_stride, exists, batch, out_size, spatial_scale, sampling_ratio, gamma,
    AXES: tl.constexpr,
):  # fmt: skip
    """The RoI at the pointer ``roi``, whose bins have their offsets at the pointers ``offset``.

    One of an image that there is not counts as one whose corners are NaN: it reads nothing, and that shows.
    """
    index = tl.load(roi)
    known = (index >= 0) & (index < batch) & (index == tl.floor(index))
    image = tl.where(known, index, 0.0).to(tl.int64)
    spatial_scale = tl.where(known, spatial_scale, float("nan"))
    lz, ly, lx = coordinates(roi + roi_stride, roi_stride, True, AXES, True)
    hz, hy, hx = coordinates(roi + (1 + AXES) * roi_stride, roi_stride, True, AXES, True)
    length = ((hz - lz) * spatial_scale, (hy - ly) * spatial_scale, (hx - lx) * spatial_scale)
    z, y, x = lz * spatial_scale - 0.5, ly * spatial_scale - 0.5, lx * spatial_scale - 0.5
    if offset is not None:
        oz, oy, ox = coordinates(offset, offset_stride, exists, AXES, True)
        z, y, x = z + gamma * length[0] * oz, y + gamma * length[1] * oy, x + gamma * length[2] * ox
    return image, (z, y, x), length, samples_in_bin(length, out_size, sampling_ratio, AXES)


@triton.jit
def samples_in_bin(length, out_size, sampling_ratio, AXES: tl.constexpr):
    """How many samples a bin has, as (z, y, x)."""
    infinite = float("inf")
    finite = (tl.abs(length[0]) < infinite) & (tl.abs(length[1]) < infinite) & (tl.abs(length[2]) < infinite)
    x = samples_along(length[2], out_size[2], finite, sampling_ratio)
    z, y = tl.full(x.shape, 1, tl.int32), tl.full(x.shape, 1, tl.int32)
    if AXES > 1:
        y = samples_along(length[1], out_size[1], finite, sampling_ratio)
    if AXES > 2:
        z = samples_along(length[0], out_size[0], finite, sampling_ratio)
    return z, y, x


@triton.jit
def samples_along(length, bins, finite, sampling_ratio):
    """How many samples a bin has along one axis."""
    # Divided exactly: a whole quotient that came out a little larger would be one sample more.
    cells = tl.ceil(tl.div_rn(length, bins.to(tl.float32)))
    cells = tl.where(cells > 0, cells, 0.0)
    cells = tl.where(cells < _MOST_SAMPLES, cells, 1.0 * _MOST_SAMPLES)
    # One sample shows what a corner that is no number does; none would hide it.
    return tl.where(sampling_ratio > 0, sampling_ratio, tl.where(finite, cells, 1.0).to(tl.int32))


@triton.jit
def sample_shift(sample, place, out_size, origin, length, samples, AXES: tl.constexpr):
    """Where a sample of each bin lies, as (z, y, x)."""
    bz, by, bx = unravel(place, out_size, AXES)
    x = shift_along(origin[2], bx, sample % samples[2], samples[2], length[2], out_size[2])
    z, y = tl.zeros_like(x), tl.zeros_like(x)
    if AXES > 1:
        y = shift_along(origin[1], by, sample // samples[2] % samples[1], samples[1], length[1], out_size[1])
    if AXES > 2:
        z = shift_along(origin[0], bz, sample // (samples[2] * samples[1]), samples[0], length[0], out_size[0])
    return z, y, x


@triton.jit
def shift_along(origin, place, sample, samples, length, bins):
    """Where a sample of each bin lies along one axis."""
    return origin + (place + (sample + 0.5) / samples) * (length / bins)


@triton.jit
def near(shift, size, AXES: tl.constexpr):
    """Rows at most one pixel outside of the field."""
    z, y, x = shift
    result = (x >= -1) & (x <= size[2])
    if AXES > 1:
        result &= (y >= -1) & (y <= size[1])
    if AXES > 2:
        result &= (z >= -1) & (z <= size[0])
    return result


@triton.jit(do_not_specialize=["batch", "bins", "D", "H", "W", "out_d", "out_h", "out_w", "sampling_ratio"])
def deform_roi_pool_forward(
    input,
    rois,
    offset,
    output,
    input_strides,
    rois_strides,
    offset_strides,
    batch,
    bins,
    D,
    H,
    W,
    out_d,
    out_h,
    out_w,
    spatial_scale,
    sampling_ratio,
    gamma,
    CHANNELS: tl.constexpr,
    AXES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = CHANNELS % (COLUMNS * PARTS) == 0
    split, program = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    roi, place, exists = tile_bins(program, bins, ROWS)
    tile = (split * COLUMNS * PARTS + tl.arange(0, COLUMNS), input_strides[2], CHANNELS)
    size, out_size = (D, H, W), (out_d, out_h, out_w)
    if offset is not None:
        offset += roi * offset_strides[0] + place.to(tl.int64) * offset_strides[2]
    image, origin, length, samples = read_roi(
        rois + roi * rois_strides[0], rois_strides[1], offset, offset_strides[1], exists, batch, out_size,
        spatial_scale, sampling_ratio, gamma, AXES,
    )  # fmt: skip

    field = input + image * input_strides[0]
    total = samples[0] * samples[1] * samples[2]
    result = zeros(ROWS, COLUMNS, PARTS)
    for sample in tl.range(0, total, loop_unroll_factor=UNROLL):
        shift = sample_shift(sample, place, out_size, origin, length, samples, AXES)
        result = interpolate(
            result, field, input_strides[1], tile, size, locate((0, 0, 0), shift, size, AXES, True),
            tl.where(defined(shift), 1.0 / total, float("nan")), near(shift, size, AXES) & exists,
            AXES, True, False, PARTS, WHOLE,
        )  # fmt: skip
    # Neighbours in the output are bins: the parts of a tile are written channel by channel.
    store_parts(
        output + (roi * CHANNELS * bins + place), (tile[0], bins.to(tl.int64), CHANNELS), result, exists, PARTS, WHOLE
    )


@triton.jit(
    do_not_specialize=["batch", "bins", "D", "H", "W", "out_d", "out_h", "out_w", "sampling_ratio", "bin_stride"]
)
def deform_roi_pool_backward(
    grad_output,
    input,
    rois,
    offset,
    grad_input,
    grad_offset,
    grad_output_strides,
    input_strides,
    rois_strides,
    offset_strides,
    batch,
    bins,
    D,
    H,
    W,
    out_d,
    out_h,
    out_w,
    spatial_scale,
    sampling_ratio,
    gamma,
    bin_stride,
    CHANNELS: tl.constexpr,
    AXES: tl.constexpr,
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
    roi, place, exists = tile_bins(tl.program_id(0), bins, ROWS)
    size, out_size = (D, H, W), (out_d, out_h, out_w)
    if offset is not None:
        offset += roi * offset_strides[0] + place.to(tl.int64) * offset_strides[2]
    image, origin, length, samples = read_roi(
        rois + roi * rois_strides[0], rois_strides[1], offset, offset_strides[1], exists, batch, out_size,
        spatial_scale, sampling_ratio, gamma, AXES,
    )  # fmt: skip

    field = input + image * input_strides[0]
    first = image * (D.to(tl.int64) * H * W) * CHANNELS
    # Where the compiler knows that bins are neighbours, it reads them in that order, and turns every corner's amounts.
    grad_output += roi * grad_output_strides[0] + place.to(tl.int64) * bin_stride
    total = samples[0] * samples[1] * samples[2]
    z = tl.zeros((ROWS,), tl.float32)
    y, x = z, z
    for split in range(SPLITS):
        columns = split * COLUMNS * PARTS + tl.arange(0, COLUMNS)
        strided = (columns.to(tl.int64), grad_output_strides[1], CHANNELS)
        cotangent = load_parts(grad_output, strided, exists, PARTS, WHOLE)
        for sample in tl.range(0, total, loop_unroll_factor=UNROLL):
            shift = sample_shift(sample, place, out_size, origin, length, samples, AXES)
            _, by_z, by_y, by_x = differentiate(
                cotangent, field, input_strides[1], grad_input, first, CHANNELS, (columns, input_strides[2], CHANNELS),
                size, locate((0, 0, 0), shift, size, AXES, True), 1.0 / total, near(shift, size, AXES) & exists,
                AXES, True, False, PARTS, WHOLE, FIELD, POINTS, EXACT,
            )  # fmt: skip
            undefined = tl.where(defined(shift), 0.0, float("nan"))
            z += by_z * follows(0, shift[0], D, True) + undefined
            y += by_y * follows(0, shift[1], H, True) + undefined
            x += by_x * follows(0, shift[2], W, True) + undefined
    if POINTS:
        factor = gamma / tl.where(total > 0, total, 1)
        slopes = (z * (factor * length[0]), y * (factor * length[1]), x * (factor * length[2]))
        store_coordinates(grad_offset + roi * AXES * bins + place, bins, slopes, exists, AXES, True)


def extent(input: Tensor, rois: Tensor, offset: Tensor | None, output_size: Sequence[int], *_: object) -> int:
    """The largest number that kernels have to keep in 32 bits."""
    return max(prod(input.shape[2:]), prod(output_size))


def forward(input: Tensor, rois: Tensor, offset: Tensor | None, *steps: Any) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    tensors, strides, numbers, constants = _problem(input, rois, offset, *steps)
    output_size, channels = steps[0], input.shape[1]
    output = input.new_empty(len(rois), channels, *output_size)

    def programs(config: Config) -> int:
        return _tiles(output, config) * triton.cdiv(channels, config.blocks["COLUMNS"] * config.blocks["PARTS"])

    configs = row_configs(prod(output_size), len(rois), channels, 16 // input.itemsize, most_parts=2)
    launch(deform_roi_pool_forward, programs, [*tensors, output, *strides, *numbers], constants, configs)
    return output


def backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *steps: Any
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in the schema."""
    *steps, output_mask = steps
    tensors, strides, numbers, constants = _problem(input, rois, offset, *steps)

    def most() -> Tensor:
        return largest(grad_output) * max(len(rois) * prod(grad_output.shape[2:]), 1)

    shape = input.movedim(1, -1).shape
    grad_input = FieldGradient(input, shape, output_mask[0], most)
    by_offset = output_mask[1] and offset is not None
    grad_offset = (input if offset is None else offset).new_empty(offset.shape if by_offset else 0)
    constants |= {"FIELD": grad_input.wanted, "POINTS": by_offset, "EXACT": grad_input.exact}
    if by_offset or grad_input.wanted:
        flat = grad_output.flatten(2)
        launch(
            deform_roi_pool_backward,
            lambda config: _tiles(grad_output, config),
            [flat, *tensors, grad_input.argument, grad_offset, flat.stride(), *strides, *numbers, flat.stride(2)],
            constants,
            row_configs(prod(grad_output.shape[2:]), len(rois), input.shape[1], grad_input.vector, most_parts=4),
        )
    by_input = grad_input.result()
    return by_input.movedim(-1, 1).contiguous() if grad_input.wanted else by_input, grad_offset


def _tiles(output: Tensor, config: Config) -> int:
    return len(output) * triton.cdiv(prod(output.shape[2:]), config.blocks["ROWS"])


def _problem(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> tuple[list[Tensor | None], list[tuple[int, ...]], list[Any], dict[str, Any]]:
    """What both kernels are given: tensors with the spatial axes as one, their strides, numbers, constants."""
    size = input.shape[2:]
    field = input.movedim(1, -1)
    if field.stride(-1) != 1:
        field = field.contiguous()
    tensors = [field.flatten(1, -2), rois, None if offset is None else offset.flatten(2)]
    strides = [(0, 0, 0) if t is None else t.stride() for t in tensors]
    out_size = lifted(output_size, 1)
    numbers = [len(input), prod(out_size), *lifted(size, 1), *out_size, spatial_scale, sampling_ratio, gamma]
    return tensors, strides, numbers, {"CHANNELS": input.shape[1], "AXES": len(size)}
