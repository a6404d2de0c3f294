"""The Triton kernels of deformable convolution; see ``sample/gpu.py`` for the notation.

The channels that share both a weight group and an offset group form a piece. A program loops over the pieces of its
group, the taps and chunks of channels. Samples are gathered into registers and used in matrix products from
there; no columns are ever stored. If every channel is a group, there is no matrix product: the same
kernels then multiply each channel by its own weight.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..sample.gpu import (
    Columns,
    Field,
    Gradient,
    coordinates,
    defined,
    differentiate,
    interpolate,
    locate,
    product,
    read_size,
    slopes_of,
    store_coordinates,
    tile_rows,
    unravel,
    zeros,
)


class Inputs(NamedTuple):
    """The sources of samples: tensors with one flattened spatial axis, and the size of the output.

    The size of the input and the number of output positions are separate arguments, which take no registers, unlike
    numbers computed from a packed size; the kernels with products have none to spare.
    """

    input: Any
    offset: Any
    mask: Any
    out_size: tuple[int, int, int]


class Groups(NamedTuple):
    """The division of channels and filters into groups."""

    filters: int
    """In all groups."""
    count: int
    """Of the weight's groups."""
    channels: int
    """Of one of them."""
    offset_channels: int
    """Of a group that shares its points."""
    pieces: int
    """The most pieces of a group."""
    piece: int
    """The channels of the largest one."""
    even: bool
    """Whether all pieces are equal."""


@triton.jit
def rows_of(tensor, image, place):
    """Pointers to the first element of each position in a tensor."""
    return tensor.data + image * tensor.strides[0] + place.to(tl.int64) * tensor.strides[2]


@triton.jit
def tap_point(inputs, image, place, tap, offset_group, exists, STEPS: tl.constexpr, RULE: tl.constexpr):
    """Base and shift of the point that a tap samples for the output positions ``place``."""
    KERNEL: tl.constexpr = STEPS.kernel
    z, y, x = unravel(place, read_size(inputs.out_size, RULE), RULE)
    base = (
        z * STEPS.stride[0] + (tap // (KERNEL[1] * KERNEL[2]) * STEPS.dilation[0] - STEPS.padding[0]),
        y * STEPS.stride[1] + (tap // KERNEL[2] % KERNEL[1] * STEPS.dilation[1] - STEPS.padding[1]),
        x * STEPS.stride[2] + (tap % KERNEL[2] * STEPS.dilation[2] - STEPS.padding[2]),
    )
    channel_stride = inputs.offset.strides[1]
    first = (offset_group * product(KERNEL) + tap).to(tl.int64) * RULE.axes * channel_stride
    pointers = rows_of(inputs.offset, image, place) + first
    return base, coordinates(pointers, channel_stride, exists, RULE, False)


@triton.jit
def tap_factor(inputs, image, place, channel, exists):
    """The factor of a tap: that of the mask, or 1."""
    factor = tl.where(exists, 1.0, 0.0)
    if inputs.mask is not None:
        pointers = rows_of(inputs.mask, image, place) + channel.to(tl.int64) * inputs.mask.strides[1]
        factor = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    return factor


@triton.jit
def gather(
    inputs, size, columns, image, place, tap, offset_group, exists,
    STEPS: tl.constexpr, RULE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of a tile of samples, multiplied by their factors."""
    base, shift = tap_point(inputs, image, place, tap, offset_group, exists, STEPS, RULE)
    known = defined(shift)
    factor = tap_factor(inputs, image, place, offset_group * product(STEPS.kernel) + tap, exists)
    field = Field(inputs.input.data + image * inputs.input.strides[0], inputs.input.strides[2], size)
    return interpolate(
        zeros(place.shape[0], columns.index.shape[0], PARTS), field, columns, locate(base, shift, size, RULE),
        tl.where(known, factor, float("nan")), known & exists, RULE,
    )  # fmt: skip


@triton.jit
def overlap(group, piece, CHANNELS: tl.constexpr, OTHERS_CHANNELS: tl.constexpr):
    """A piece of a group of CHANNELS channels: the other group that it belongs to, its first channel and its end."""
    other = group * CHANNELS // OTHERS_CHANNELS + piece
    first = tl.maximum(group * CHANNELS, other * OTHERS_CHANNELS)
    return other, first, tl.minimum((group + 1) * CHANNELS, (other + 1) * OTHERS_CHANNELS)


@triton.jit
def chunk_of(start, stride, end, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile from the channel ``start`` on."""
    return Columns(start + tl.arange(0, COLUMNS), stride, None if WHOLE else end)


@triton.jit
def load_filters(pointers, rows, columns, row_count, column_count, stride, OPERAND: tl.constexpr):
    """A tile of the weight as an operand of a product, 0 where there is none."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    where = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers + where, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def load_taps(weight, channels, copy, tap, end, GROUPS: tl.constexpr, STEPS: tl.constexpr):
    """The weight of one tap for some channels that are convolved separately."""
    pointers = weight + (channels * (GROUPS.filters // GROUPS.count) + copy) * product(STEPS.kernel) + tap
    return tl.load(pointers, mask=channels < end, other=0.0).to(tl.float32)


@triton.jit
def load_cotangent(rows, stride, channels, row_mask, channel_mask, OPERAND: tl.constexpr):
    """A tile of the gradient of the output, from pointers to its rows. Rows are positions, columns are channels."""
    pointers = rows[:, None] + (channels.to(tl.int64) * stride)[None, :]
    return tl.load(pointers, mask=row_mask[:, None] & channel_mask[None, :], other=0.0).to(OPERAND)


@triton.jit(do_not_specialize=["positions", "depth", "height", "width"])
def deform_conv_forward(
    inputs, positions, depth, height, width, weight, bias, output,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = product(STEPS.kernel)
    GROUP_FILTERS: tl.constexpr = GROUPS.filters // GROUPS.count
    BLOCKS: tl.constexpr = (GROUP_FILTERS + OUTPUTS - 1) // OUTPUTS
    CHUNKS: tl.constexpr = (GROUPS.piece + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = GROUPS.even and GROUPS.piece % (COLUMNS * PARTS) == 0
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    group = program % GROUPS.count
    image, place, exists = tile_rows(program // GROUPS.count, positions, ROWS)
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)

    weight += group * GROUP_FILTERS
    result = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(GROUPS.pieces * TAPS * CHUNKS):
        tap = step // CHUNKS % TAPS
        offset_group, first, end = overlap(group, step // (CHUNKS * TAPS), GROUPS.channels, GROUPS.offset_channels)
        columns = chunk_of(first + step % CHUNKS * (COLUMNS * PARTS), inputs.input.strides[1], end, WHOLE, COLUMNS)
        # Groups may have different numbers of pieces.
        there = exists & (first < end)
        samples = gather(
            inputs, (depth, height, width), columns, image, place, tap, offset_group, there, STEPS, RULE, PARTS
        )
        for PART in tl.static_range(PARTS):
            filters = load_filters(
                weight + (tap * GROUPS.channels - group * GROUPS.channels).to(tl.int64) * GROUPS.filters,
                columns.index + PART * COLUMNS, outputs, end, GROUP_FILTERS, GROUPS.filters, OPERAND,
            )  # fmt: skip
            result = tl.dot(samples[PART].to(OPERAND), filters, result, input_precision=PRECISION)
    outputs += group * GROUP_FILTERS
    of_group = outputs < (group + 1) * GROUP_FILTERS
    if bias is not None:
        result += tl.load(bias + outputs, mask=of_group, other=0.0).to(tl.float32)[None, :]
    rows = output + (image * GROUPS.filters * positions + place)
    mask = exists[:, None] if GROUP_FILTERS % OUTPUTS == 0 else exists[:, None] & of_group[None, :]
    tl.store(rows[:, None] + (outputs.to(tl.int64) * positions)[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["positions", "depth", "height", "width"])
def deform_conv_forward_depthwise(
    inputs, positions, depth, height, width, weight, bias, output,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    MULTIPLE: tl.constexpr = GROUPS.filters // GROUPS.count
    OFFSET_CHANNELS: tl.constexpr = GROUPS.offset_channels
    CHUNKS: tl.constexpr = (OFFSET_CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = OFFSET_CHANNELS % (COLUMNS * PARTS) == 0
    copy, program = tl.program_id(0) % MULTIPLE, tl.program_id(0) // MULTIPLE
    chunk, program = program % CHUNKS, program // CHUNKS
    offset_group, program = program % (GROUPS.count // OFFSET_CHANNELS), program // (GROUPS.count // OFFSET_CHANNELS)
    image, place, exists = tile_rows(program, positions, ROWS)
    end = (offset_group + 1) * OFFSET_CHANNELS
    columns = chunk_of(
        offset_group * OFFSET_CHANNELS + chunk * (COLUMNS * PARTS), inputs.input.strides[1], end, WHOLE, COLUMNS
    )  # fmt: skip

    result = zeros(ROWS, COLUMNS, PARTS)
    for tap in tl.range(0, product(STEPS.kernel), loop_unroll_factor=UNROLL):
        samples = gather(
            inputs, (depth, height, width), columns, image, place, tap, offset_group, exists, STEPS, RULE, PARTS
        )
        sums = ()
        for PART in tl.static_range(PARTS):
            filters = load_taps(weight, columns.index + PART * COLUMNS, copy, tap, end, GROUPS, STEPS)
            sums = sums + (result[PART] + samples[PART] * filters[None, :],)
        result = sums
    row = place.to(tl.int64)
    for PART in tl.static_range(PARTS):
        of_part = columns.index + PART * COLUMNS < end
        outputs = (columns.index + PART * COLUMNS) * MULTIPLE + copy
        values = result[PART]
        if bias is not None:
            values += tl.load(bias + outputs, mask=of_part, other=0.0).to(tl.float32)[None, :]
        channels = (image * GROUPS.filters)[:, None] + outputs[None, :]
        tl.store(output + channels * positions + row[:, None], values, mask=exists[:, None] & of_part[None, :])


@triton.jit
def cotangent_of_samples(
    rows, stride, weight, exists, group, tap, start, end,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of the gradient by the samples of one tap and of the channels from ``start`` on."""
    GROUP_FILTERS: tl.constexpr = GROUPS.filters // GROUPS.count
    columns = start + tl.arange(0, COLUMNS)
    result = zeros(exists.shape[0], COLUMNS, PARTS)
    if DEPTHWISE:
        for copy in range(GROUP_FILTERS):
            sums = ()
            for PART in tl.static_range(PARTS):
                channels = columns + PART * COLUMNS
                filters = load_taps(weight, channels, copy, tap, end, GROUPS, STEPS)
                part = load_cotangent(
                    rows, stride, channels * GROUP_FILTERS + copy, exists, channels < end, tl.float32
                )  # fmt: skip
                sums = sums + (result[PART] + part * filters[None, :],)
            result = sums
    else:
        weight += (tap * GROUPS.filters + group * GROUP_FILTERS).to(tl.int64) * GROUPS.channels
        for block in range((GROUP_FILTERS + OUTPUTS - 1) // OUTPUTS):
            outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
            there = (outputs < GROUP_FILTERS) & (start < end)
            part = load_cotangent(rows, stride, group * GROUP_FILTERS + outputs, exists, there, OPERAND)
            sums = ()
            for PART in tl.static_range(PARTS):
                filters = load_filters(
                    weight - group * GROUPS.channels, outputs, columns + PART * COLUMNS, GROUP_FILTERS, end,
                    GROUPS.channels, OPERAND,
                )  # fmt: skip
                sums = sums + (tl.dot(part, filters, result[PART], input_precision=PRECISION),)
            result = sums
    return result


@triton.jit(do_not_specialize=["positions", "depth", "height", "width"])
def deform_conv_backward_data(
    grad_output, inputs, positions, depth, height, width, weight, grad_input, grad_offset, grad_mask,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    DEPTHWISE: tl.constexpr, PLANAR: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = product(STEPS.kernel)
    BY_POINT: tl.constexpr = grad_offset is not None
    OFFSET_CHANNELS: tl.constexpr = GROUPS.offset_channels
    CHANNELS: tl.constexpr = GROUPS.count * GROUPS.channels
    OFFSET_GROUPS: tl.constexpr = CHANNELS // OFFSET_CHANNELS
    CHUNKS: tl.constexpr = (GROUPS.piece + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = GROUPS.even and GROUPS.piece % (COLUMNS * PARTS) == 0
    tap, program = tl.program_id(0) % TAPS, tl.program_id(0) // TAPS
    offset_group = program % OFFSET_GROUPS
    size = (depth, height, width)
    image, place, exists = tile_rows(program // OFFSET_GROUPS, positions, ROWS)

    field = inputs.input.data + image * inputs.input.strides[0]
    channel_stride, stride = inputs.input.strides[1], inputs.input.strides[2]
    field_positions = size[0].to(tl.int64) * size[1] * size[2]
    rows = rows_of(grad_output, image, place)
    base, shift = tap_point(inputs, image, place, tap, offset_group, exists, STEPS, RULE)
    known = defined(shift)
    factor = tap_factor(inputs, image, place, offset_group * TAPS + tap, exists)
    cell = locate(base, shift, size, RULE)
    amount = tl.where(known, 0.0, float("nan"))
    z, y, x = amount, amount, amount
    for step in range(GROUPS.pieces * CHUNKS):
        if DEPTHWISE:
            group, first, end = 0, offset_group * OFFSET_CHANNELS, (offset_group + 1) * OFFSET_CHANNELS
        else:
            group, first, end = overlap(offset_group, step // CHUNKS, OFFSET_CHANNELS, GROUPS.channels)
        first += step % CHUNKS * (COLUMNS * PARTS)
        cotangent = cotangent_of_samples(
            rows, grad_output.strides[1], weight, exists, group, tap, first, end,
            GROUPS, STEPS, DEPTHWISE, PRECISION, OPERAND, OUTPUTS, COLUMNS, PARTS,
        )  # fmt: skip
        if PLANAR:
            columns = chunk_of(0, 1, 1, WHOLE, COLUMNS)
            plane = Field(field + first * channel_stride, stride, size)
            gradient = Gradient(grad_input, (image * CHANNELS + first) * field_positions, 1)
        else:
            columns = chunk_of(first, channel_stride, end, WHOLE, COLUMNS)
            plane = Field(field, stride, size)
            gradient = Gradient(grad_input, image * field_positions * CHANNELS, CHANNELS)
        by_factor, by_z, by_y, by_x = differentiate(
            cotangent, plane, gradient, columns, cell, factor, known & exists, RULE, BY_POINT
        )  # fmt: skip
        amount, z, y, x = amount + by_factor, z + by_z, y + by_y, x + by_x
    if BY_POINT:
        slopes = slopes_of((z, y, x), (factor, factor, factor), base, shift, size, RULE)
        channel, row = (image * OFFSET_GROUPS + offset_group) * TAPS + tap, place.to(tl.int64)
        pointers = grad_offset + channel * RULE.axes * positions + row
        store_coordinates(pointers, positions, slopes, exists, RULE, False)
        if grad_mask is not None:
            tl.store(grad_mask + channel * positions + row, amount, mask=exists)


@triton.jit(do_not_specialize=["positions", "depth", "height", "width", "batch", "splits"])
def deform_conv_backward_weight(
    grad_output, inputs, positions, depth, height, width, partial, batch, splits,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = product(STEPS.kernel)
    OFFSET_CHANNELS: tl.constexpr = GROUPS.offset_channels
    GROUP_FILTERS: tl.constexpr = GROUPS.filters // GROUPS.count
    BLOCKS: tl.constexpr = GROUP_FILTERS if DEPTHWISE else (GROUP_FILTERS + OUTPUTS - 1) // OUTPUTS
    CHUNKS: tl.constexpr = (GROUPS.piece + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = GROUPS.even and GROUPS.piece % (COLUMNS * PARTS) == 0
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    chunk, program = program % CHUNKS, program // CHUNKS
    tap, program = program % TAPS, program // TAPS
    if DEPTHWISE:
        group, split = program % (GROUPS.count // OFFSET_CHANNELS), program // (GROUPS.count // OFFSET_CHANNELS)
        offset_group, first, end = group, group * OFFSET_CHANNELS, (group + 1) * OFFSET_CHANNELS
        sums = ()
        for _ in tl.static_range(PARTS):
            sums = sums + (tl.zeros((COLUMNS,), tl.float32),)
    else:
        piece, program = program % GROUPS.pieces, program // GROUPS.pieces
        group, split = program % GROUPS.count, program // GROUPS.count
        offset_group, first, end = overlap(group, piece, GROUPS.channels, OFFSET_CHANNELS)
        sums = zeros(COLUMNS, OUTPUTS, PARTS)
    columns = chunk_of(first + chunk * (COLUMNS * PARTS), inputs.input.strides[1], end, WHOLE, COLUMNS)
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)

    for tile in range(split, batch * tl.cdiv(positions, ROWS), splits):
        image, place, exists = tile_rows(tile, positions, ROWS)
        exists &= first < end
        samples = gather(
            inputs, (depth, height, width), columns, image, place, tap, offset_group, exists, STEPS, RULE, PARTS
        )
        rows = rows_of(grad_output, image, place)
        more = ()
        if DEPTHWISE:
            for PART in tl.static_range(PARTS):
                channels = columns.index + PART * COLUMNS
                part = load_cotangent(
                    rows, grad_output.strides[1], channels * GROUP_FILTERS + block, exists, channels < end, tl.float32
                )  # fmt: skip
                more = more + (sums[PART] + tl.sum(samples[PART] * part, 0),)
        else:
            part = load_cotangent(
                rows, grad_output.strides[1], group * GROUP_FILTERS + outputs, exists, outputs < GROUP_FILTERS, OPERAND
            )  # fmt: skip
            for PART in tl.static_range(PARTS):
                samples_of_part = tl.trans(samples[PART].to(OPERAND))
                more = more + (tl.dot(samples_of_part, part, sums[PART], input_precision=PRECISION),)
        sums = more

    partial += (split * TAPS + tap).to(tl.int64) * (GROUPS.channels * GROUPS.filters)
    for PART in tl.static_range(PARTS):
        channels = columns.index + PART * COLUMNS
        if DEPTHWISE:
            tl.store(partial + channels * GROUP_FILTERS + block, sums[PART], mask=channels < end)
        else:
            rows_of_part = (channels - group * GROUPS.channels)[:, None] * GROUPS.filters
            where = rows_of_part + (group * GROUP_FILTERS + outputs)[None, :]
            tl.store(partial + where, sums[PART], mask=(channels < end)[:, None] & (outputs < GROUP_FILTERS)[None, :])
