"""Deformable sampling in Triton. A program takes some points of one group of an image; see ``sample/gpu.py``.

In the kernels the rows of a tile are points and its columns are the channels of their group.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..gpu.launch import launch, row_configs
from ..sample.gpu import (
    Columns,
    Field,
    FieldGradient,
    Gradient,
    asked_for,
    coordinates,
    defined,
    differentiate,
    interpolate,
    largest,
    largest_index,
    load_parts,
    locate,
    packed,
    positions_of,
    read_size,
    rule_of,
    slopes_of,
    store_coordinates,
    store_parts,
    strided,
    tile_rows,
    zeros,
)


@triton.jit
def read_points(points, group, place, exists, RULE: tl.constexpr):
    """The points of some rows, as (z, y, x); half a pixel further where the lower corner is to be the nearest pixel."""
    pointers = points.data + (group * points.strides[0] + place.to(tl.int64) * points.strides[1])
    z, y, x = coordinates(pointers, points.strides[2], exists, RULE, False)
    if RULE.nearest:
        z, y, x = z + 0.5, y + 0.5, x + 0.5
    return z, y, x


@triton.jit(do_not_specialize=["count"])
def deform_sample_forward(
    input, points, output, size, count, groups,
    CHANNELS: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = (CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    END: tl.constexpr = None if CHANNELS % (COLUMNS * PARTS) == 0 else CHANNELS
    split, program = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    size = read_size(size, RULE)
    group, place, exists = tile_rows(program, count, ROWS)
    columns = split * COLUMNS * PARTS + tl.arange(0, COLUMNS)
    shift = read_points(points, group, place, exists, RULE)

    known = defined(shift)
    first = group // groups * input.strides[0] + group % groups * CHANNELS * input.strides[2]
    result = interpolate(
        zeros(ROWS, COLUMNS, PARTS), Field(input.data + first, input.strides[1], size),
        Columns(columns, input.strides[2], END), locate((0, 0, 0), shift, size, RULE),
        tl.where(known, 1.0, float("nan")), known & exists, RULE,
    )  # fmt: skip
    # Neighbours in the output are points: the parts of a tile are written channel by channel.
    rows = output + (group * CHANNELS * count + place)
    store_parts(rows, Columns(columns, tl.zeros((), tl.int64) + count, END), result, exists)


@triton.jit(do_not_specialize=["count"])
def deform_sample_backward(
    grad_output, input, points, grad_input, grad_points, size, count, groups,
    CHANNELS: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    BY_POINT: tl.constexpr = grad_points is not None
    END: tl.constexpr = None if CHANNELS % (COLUMNS * PARTS) == 0 else CHANNELS
    size = read_size(size, RULE)
    group, place, exists = tile_rows(tl.program_id(0), count, ROWS)
    shift = read_points(points, group, place, exists, RULE)

    known = defined(shift)
    cell = locate((0, 0, 0), shift, size, RULE)
    image, channel = group // groups, group % groups * CHANNELS
    field = Field(input.data + image * input.strides[0] + channel * input.strides[2], input.strides[1], size)
    all_channels = (tl.zeros((), tl.int64) + groups) * CHANNELS
    gradient = Gradient(grad_input, image * positions_of(size) * all_channels + channel, all_channels)
    rows = grad_output.data + (
        image * grad_output.strides[0] + channel * grad_output.strides[1] + place.to(tl.int64) * grad_output.strides[2]
    )
    one = tl.full((ROWS,), 1.0, tl.float32)
    z = tl.where(known, 0.0, float("nan"))
    y, x = z, z
    for start in range(0, CHANNELS, COLUMNS * PARTS):
        columns = start + tl.arange(0, COLUMNS)
        cotangent = load_parts(rows, Columns(columns.to(tl.int64), grad_output.strides[1], END), exists, PARTS)
        _, by_z, by_y, by_x = differentiate(
            cotangent, field, gradient, Columns(columns, input.strides[2], END), cell, one, known & exists, RULE,
            BY_POINT,
        )  # fmt: skip
        z, y, x = z + by_z, y + by_y, x + by_x
    if BY_POINT:
        slopes = slopes_of((z, y, x), (1.0, 1.0, 1.0), (0, 0, 0), shift, size, RULE)
        pointers = grad_points + (group * count + place) * RULE.axes
        store_coordinates(pointers, 1, slopes, exists, RULE, False)


def extent(input: Tensor, points: Tensor, *_: object) -> int:
    """The largest number that kernels have to keep in 32 bits."""
    return largest_index(input.shape[2:], points.shape[2:3])


def forward(input: Tensor, points: Tensor, boundary: int, mode: int) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    arguments = _arguments(input, points, boundary, mode)
    channels, count = arguments["CHANNELS"], points.shape[2]
    sequences = points.shape[0] * points.shape[1]
    output = input.new_empty(*input.shape[:2], count)
    launch(
        deform_sample_forward,
        input.device,
        lambda blocks: (
            sequences * triton.cdiv(count, blocks["ROWS"]) * triton.cdiv(channels, blocks["COLUMNS"] * blocks["PARTS"])
        ),
        row_configs(count, sequences, channels, 16 // input.itemsize, most_parts=1),
        output=output,
        **arguments,
    )
    return output


def backward(
    grad_output: Tensor, input: Tensor, points: Tensor, boundary: int, mode: int, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    arguments = _arguments(input, points, boundary, mode)
    count, sequences = points.shape[2], points.shape[0] * points.shape[1]

    def most() -> Tensor:
        return largest(grad_output) * max(count, 1)

    grad_input = FieldGradient(input, input.movedim(1, -1).shape, output_mask[0], most)
    grad_points = points.new_empty(points.shape) if output_mask[1] else None
    if any(output_mask):
        launch(
            deform_sample_backward,
            input.device,
            lambda blocks: sequences * triton.cdiv(count, blocks["ROWS"]),
            row_configs(count, sequences, arguments["CHANNELS"], grad_input.vector, most_parts=4),
            grad_output=strided(grad_output),
            grad_input=grad_input.sums,
            grad_points=grad_points,
            **arguments,
        )
    by_input = grad_input.result()
    if by_input is not None:
        by_input = by_input.movedim(-1, 1).contiguous()
    return asked_for([by_input, grad_points], output_mask, input)


def _arguments(input: Tensor, points: Tensor, boundary: int, mode: int) -> dict[str, Any]:
    """What both kernels are given."""
    field = input.movedim(1, -1)
    if field.stride(-1) != 1:
        field = field.contiguous()
    return {
        "input": strided(field.flatten(1, -2)),
        "points": strided(points.flatten(0, 1)),
        "size": packed(input.shape[2:]),
        "count": points.shape[2],
        "groups": points.shape[1],
        "CHANNELS": input.shape[1] // points.shape[1],
        "RULE": rule_of(points.shape[-1], boundary, mode),
    }
