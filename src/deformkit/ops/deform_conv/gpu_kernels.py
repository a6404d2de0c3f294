"""The Triton kernels of deformable convolution; see ``sample/gpu.py`` for the notation.

The channels that share both a weight group and an offset group are a piece; a program goes over the pieces of its
group, over the taps and over chunks of channels. Samples are gathered into registers and go into matrix products from
there; no columns are ever stored. Where every channel is a group of its own, there is no product to speak of: the same
kernels then multiply each channel by its own weight.
"""

import triton
import triton.language as tl

from ..sample.gpu import (
    coordinates,
    defined,
    differentiate,
    follows,
    interpolate,
    locate,
    store_coordinates,
    tile_rows,
    unravel,
    zeros,
)


@triton.jit
def tap_point(
    place,
    out_size,
    offset,
    channel_stride,
    offset_group,
    tap,
    exists,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
):
    """Base and shift of the point that a tap reads for the output positions ``place``."""
    z, y, x = unravel(place, out_size, AXES)
    base = (
        z * STRIDE[0] + (tap // (KERNEL[1] * KERNEL[2]) * DILATION[0] - PADDING[0]),
        y * STRIDE[1] + (tap // KERNEL[2] % KERNEL[1] * DILATION[1] - PADDING[1]),
        x * STRIDE[2] + (tap % KERNEL[2] * DILATION[2] - PADDING[2]),
    )
    first = offset + (offset_group * TAPS + tap).to(tl.int64) * AXES * channel_stride
    return base, coordinates(first, channel_stride, exists, AXES, False)


@triton.jit
def tap_factor(mask, channel_stride, channel, exists, MODULATED: tl.constexpr):
    """The factor of a tap: that of the mask, or 1."""
    factor = tl.where(exists, 1.0, 0.0)
    if MODULATED:
        factor = tl.load(mask + channel.to(tl.int64) * channel_stride, mask=exists, other=0.0).to(tl.float32)
    return factor


@triton.jit
def overlap(group, piece, CHANNELS: tl.constexpr, OTHERS_CHANNELS: tl.constexpr):
    """The piece of a group of CHANNELS channels: which of the other groups it shares, its first channel and its end."""
    other = group * CHANNELS // OTHERS_CHANNELS + piece
    first = tl.maximum(group * CHANNELS, other * OTHERS_CHANNELS)
    return other, first, tl.minimum((group + 1) * CHANNELS, (other + 1) * OTHERS_CHANNELS)


@triton.jit
def load_filters(pointers, rows, columns, row_count, column_count, stride, OPERAND: tl.constexpr):
    """A tile of the weight, 0 where there is none, as an operand of a product."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    where = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers + where, mask=mask, other=0.0).to(OPERAND)


@triton.jit(do_not_specialize=["positions", "D", "H", "W", "out_h", "out_w"])
def deform_conv_forward(
    input,
    offset,
    weight,
    bias,
    mask,
    output,
    input_strides,
    offset_strides,
    mask_strides,
    positions,
    D,
    H,
    W,
    out_h,
    out_w,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    OFFSET_CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    MODULATED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    GROUP_FILTERS: tl.constexpr = FILTERS // GROUPS
    BLOCKS: tl.constexpr = (GROUP_FILTERS + OUTPUTS - 1) // OUTPUTS
    CHUNKS: tl.constexpr = (PIECE + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = EVEN and PIECE % (COLUMNS * PARTS) == 0
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    group = program % GROUPS
    image, place, exists = tile_rows(program // GROUPS, positions, ROWS)
    size, out_size, row = (D, H, W), (D, out_h, out_w), place.to(tl.int64)
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)

    field = input + image * input_strides[0]
    offset += image * offset_strides[0] + row * offset_strides[2]
    weight += group * GROUP_FILTERS
    if MODULATED:
        mask += image * mask_strides[0] + row * mask_strides[2]
    result = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(PIECES * TAPS * CHUNKS):
        tap = step // CHUNKS % TAPS
        offset_group, first, end = overlap(group, step // (CHUNKS * TAPS), GROUP_CHANNELS, OFFSET_CHANNELS)
        columns = first + step % CHUNKS * (COLUMNS * PARTS) + tl.arange(0, COLUMNS)
        # A group may have fewer pieces than another.
        there = exists & (first < end)
        base, shift = tap_point(
            place, out_size, offset, offset_strides[1], offset_group, tap, there,
            TAPS, KERNEL, STRIDE, PADDING, DILATION, AXES,
        )  # fmt: skip
        known = defined(shift)
        factor = tap_factor(mask, mask_strides[1], offset_group * TAPS + tap, there, MODULATED)
        samples = interpolate(
            zeros(ROWS, COLUMNS, PARTS), field, input_strides[2], (columns, input_strides[1], end), size,
            locate(base, shift, size, AXES, BORDER), tl.where(known, factor, float("nan")), known & there,
            AXES, BORDER, False, PARTS, WHOLE,
        )  # fmt: skip
        for PART in tl.static_range(PARTS):
            inputs = columns + PART * COLUMNS
            filters = load_filters(
                weight + (tap * GROUP_CHANNELS - group * GROUP_CHANNELS).to(tl.int64) * FILTERS,
                inputs, outputs, end, GROUP_FILTERS, FILTERS, OPERAND,
            )  # fmt: skip
            result = tl.dot(samples[PART].to(OPERAND), filters, result, input_precision=PRECISION)
    outputs += group * GROUP_FILTERS
    of_group = outputs < (group + 1) * GROUP_FILTERS
    if BIASED:
        result += tl.load(bias + outputs, mask=of_group, other=0.0).to(tl.float32)[None, :]
    rows = output + (image * FILTERS * positions + row)
    mask = exists[:, None] if GROUP_FILTERS % OUTPUTS == 0 else exists[:, None] & of_group[None, :]
    tl.store(rows[:, None] + (outputs.to(tl.int64) * positions)[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["positions", "D", "H", "W", "out_h", "out_w"])
def deform_conv_forward_depthwise(
    input,
    offset,
    weight,
    bias,
    mask,
    output,
    input_strides,
    offset_strides,
    mask_strides,
    positions,
    D,
    H,
    W,
    out_h,
    out_w,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    MODULATED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    MULTIPLE: tl.constexpr = FILTERS // GROUPS
    CHUNKS: tl.constexpr = (OFFSET_CHANNELS + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = OFFSET_CHANNELS % (COLUMNS * PARTS) == 0
    copy, program = tl.program_id(0) % MULTIPLE, tl.program_id(0) // MULTIPLE
    chunk, program = program % CHUNKS, program // CHUNKS
    offset_group = program % (GROUPS // OFFSET_CHANNELS)
    image, place, exists = tile_rows(program // (GROUPS // OFFSET_CHANNELS), positions, ROWS)
    size, out_size, row = (D, H, W), (D, out_h, out_w), place.to(tl.int64)
    end = (offset_group + 1) * OFFSET_CHANNELS
    columns = offset_group * OFFSET_CHANNELS + chunk * (COLUMNS * PARTS) + tl.arange(0, COLUMNS)

    field = input + image * input_strides[0]
    offset += image * offset_strides[0] + row * offset_strides[2]
    if MODULATED:
        mask += image * mask_strides[0] + row * mask_strides[2]
    result = zeros(ROWS, COLUMNS, PARTS)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        base, shift = tap_point(
            place, out_size, offset, offset_strides[1], offset_group, tap, exists,
            TAPS, KERNEL, STRIDE, PADDING, DILATION, AXES,
        )  # fmt: skip
        known = defined(shift)
        factor = tap_factor(mask, mask_strides[1], offset_group * TAPS + tap, exists, MODULATED)
        samples = interpolate(
            zeros(ROWS, COLUMNS, PARTS), field, input_strides[2], (columns, input_strides[1], end), size,
            locate(base, shift, size, AXES, BORDER), tl.where(known, factor, float("nan")), known & exists,
            AXES, BORDER, False, PARTS, WHOLE,
        )  # fmt: skip
        sums = ()
        for PART in tl.static_range(PARTS):
            filters = load_taps(weight, columns + PART * COLUMNS, copy, tap, end, MULTIPLE, TAPS)
            sums = sums + (result[PART] + samples[PART] * filters[None, :],)
        result = sums
    for PART in tl.static_range(PARTS):
        of_part = columns + PART * COLUMNS < end
        outputs = (columns + PART * COLUMNS) * MULTIPLE + copy
        values = result[PART]
        if BIASED:
            values += tl.load(bias + outputs, mask=of_part, other=0.0).to(tl.float32)[None, :]
        channels = (image * FILTERS)[:, None] + outputs[None, :]
        tl.store(output + channels * positions + row[:, None], values, mask=exists[:, None] & of_part[None, :])


@triton.jit
def load_taps(weight, channels, copy, tap, end, MULTIPLE: tl.constexpr, TAPS: tl.constexpr):
    """The weight of one tap for each of some channels that are convolved by themselves."""
    pointers = weight + (channels * MULTIPLE + copy) * TAPS + tap
    return tl.load(pointers, mask=channels < end, other=0.0).to(tl.float32)


@triton.jit
def load_cotangent(rows, stride, channels, row_mask, channel_mask, OPERAND: tl.constexpr):
    """A tile of the output's gradient, from pointers to its rows, which are positions; its columns are channels."""
    pointers = rows[:, None] + (channels.to(tl.int64) * stride)[None, :]
    return tl.load(pointers, mask=row_mask[:, None] & channel_mask[None, :], other=0.0).to(OPERAND)


@triton.jit(do_not_specialize=["positions", "D", "H", "W", "out_h", "out_w"])
def deform_conv_backward_data(
    grad_output,
    input,
    offset,
    weight,
    mask,
    grad_input,
    grad_offset,
    grad_mask,
    grad_output_strides,
    input_strides,
    offset_strides,
    mask_strides,
    positions,
    D,
    H,
    W,
    out_h,
    out_w,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    OFFSET_CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    MODULATED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PLANAR: tl.constexpr,
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    CHANNELS: tl.constexpr = GROUPS * GROUP_CHANNELS
    OFFSET_GROUPS: tl.constexpr = CHANNELS // OFFSET_CHANNELS
    GROUP_FILTERS: tl.constexpr = FILTERS // GROUPS
    CHUNKS: tl.constexpr = (PIECE + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = EVEN and PIECE % (COLUMNS * PARTS) == 0
    tap, program = tl.program_id(0) % TAPS, tl.program_id(0) // TAPS
    offset_group = program % OFFSET_GROUPS
    image, place, exists = tile_rows(program // OFFSET_GROUPS, positions, ROWS)
    size, out_size, row = (D, H, W), (D, out_h, out_w), place.to(tl.int64)

    field = input + image * input_strides[0]
    field_positions = D.to(tl.int64) * H * W
    grad_output += image * grad_output_strides[0] + row * grad_output_strides[2]
    offset += image * offset_strides[0] + row * offset_strides[2]
    if MODULATED:
        mask += image * mask_strides[0] + row * mask_strides[2]
    base, shift = tap_point(
        place, out_size, offset, offset_strides[1], offset_group, tap, exists,
        TAPS, KERNEL, STRIDE, PADDING, DILATION, AXES,
    )  # fmt: skip
    known = defined(shift)
    factor = tap_factor(mask, mask_strides[1], offset_group * TAPS + tap, exists, MODULATED)
    point = locate(base, shift, size, AXES, BORDER)
    amount = tl.where(known, 0.0, float("nan"))
    z, y, x = amount, amount, amount
    for step in range(PIECES * CHUNKS):
        if DEPTHWISE:
            group, first, end = 0, offset_group * OFFSET_CHANNELS, (offset_group + 1) * OFFSET_CHANNELS
        else:
            group, first, end = overlap(offset_group, step // CHUNKS, OFFSET_CHANNELS, GROUP_CHANNELS)
        first += step % CHUNKS * (COLUMNS * PARTS)
        columns = first + tl.arange(0, COLUMNS)
        cotangent = zeros(ROWS, COLUMNS, PARTS)
        if DEPTHWISE:
            for copy in range(GROUP_FILTERS):
                sums = ()
                for PART in tl.static_range(PARTS):
                    channels = columns + PART * COLUMNS
                    filters = load_taps(weight, channels, copy, tap, end, GROUP_FILTERS, TAPS)
                    part = load_cotangent(
                        grad_output, grad_output_strides[1], channels * GROUP_FILTERS + copy, exists, channels < end,
                        tl.float32,
                    )  # fmt: skip
                    sums = sums + (cotangent[PART] + part * filters[None, :],)
                cotangent = sums
        else:
            for block in range((GROUP_FILTERS + OUTPUTS - 1) // OUTPUTS):
                outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
                part = load_cotangent(
                    grad_output, grad_output_strides[1], group * GROUP_FILTERS + outputs, exists,
                    (outputs < GROUP_FILTERS) & (first < end), OPERAND,
                )  # fmt: skip
                sums = ()
                for PART in tl.static_range(PARTS):
                    filters = load_filters(
                        weight + (tap * FILTERS + group * GROUP_FILTERS).to(tl.int64) * GROUP_CHANNELS
                        - group * GROUP_CHANNELS,
                        outputs, columns + PART * COLUMNS, GROUP_FILTERS, end, GROUP_CHANNELS, OPERAND,
                    )  # fmt: skip
                    sums = sums + (tl.dot(part, filters, cotangent[PART], input_precision=PRECISION),)
                cotangent = sums
        if PLANAR:
            tile, plane = (tl.arange(0, COLUMNS), 1, 1), (image * CHANNELS + first) * field_positions
            by_factor, by_z, by_y, by_x = differentiate(
                cotangent, field + first * input_strides[1], input_strides[2], grad_input, plane, 1, tile, size, point,
                factor, known & exists, AXES, BORDER, False, PARTS, WHOLE, FIELD, POINTS, EXACT,
            )  # fmt: skip
        else:
            by_factor, by_z, by_y, by_x = differentiate(
                cotangent, field, input_strides[2], grad_input, image * field_positions * CHANNELS, CHANNELS,
                (columns, input_strides[1], end), size, point, factor, known & exists,
                AXES, BORDER, False, PARTS, WHOLE, FIELD, POINTS, EXACT,
            )  # fmt: skip
        amount, z, y, x = amount + by_factor, z + by_z, y + by_y, x + by_x
    if POINTS:
        slopes = (
            z * factor * follows(base[0], shift[0], D, BORDER),
            y * factor * follows(base[1], shift[1], H, BORDER),
            x * factor * follows(base[2], shift[2], W, BORDER),
        )
        channel = (image * OFFSET_GROUPS + offset_group) * TAPS + tap
        store_coordinates(grad_offset + channel * AXES * positions + row, positions, slopes, exists, AXES, False)
        if MODULATED:
            tl.store(grad_mask + channel * positions + row, amount, mask=exists)


@triton.jit(do_not_specialize=["batch", "positions", "D", "H", "W", "out_h", "out_w", "splits"])
def deform_conv_backward_weight(
    grad_output,
    input,
    offset,
    mask,
    partial,
    grad_output_strides,
    input_strides,
    offset_strides,
    mask_strides,
    positions,
    D,
    H,
    W,
    out_h,
    out_w,
    batch,
    splits,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    OFFSET_CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
    BORDER: tl.constexpr,
    MODULATED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    GROUP_FILTERS: tl.constexpr = FILTERS // GROUPS
    BLOCKS: tl.constexpr = GROUP_FILTERS if DEPTHWISE else (GROUP_FILTERS + OUTPUTS - 1) // OUTPUTS
    CHUNKS: tl.constexpr = (PIECE + COLUMNS * PARTS - 1) // (COLUMNS * PARTS)
    WHOLE: tl.constexpr = EVEN and PIECE % (COLUMNS * PARTS) == 0
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    chunk, program = program % CHUNKS, program // CHUNKS
    tap, program = program % TAPS, program // TAPS
    if DEPTHWISE:
        group, split = program % (GROUPS // OFFSET_CHANNELS), program // (GROUPS // OFFSET_CHANNELS)
        offset_group, first, end = group, group * OFFSET_CHANNELS, (group + 1) * OFFSET_CHANNELS
        sums = ()
        for _ in tl.static_range(PARTS):
            sums = sums + (tl.zeros((COLUMNS,), tl.float32),)
    else:
        piece, program = program % PIECES, program // PIECES
        group, split = program % GROUPS, program // GROUPS
        offset_group, first, end = overlap(group, piece, GROUP_CHANNELS, OFFSET_CHANNELS)
        sums = zeros(COLUMNS, OUTPUTS, PARTS)
    columns = first + chunk * (COLUMNS * PARTS) + tl.arange(0, COLUMNS)
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
    size, out_size = (D, H, W), (D, out_h, out_w)

    for tile in range(split, batch * tl.cdiv(positions, ROWS), splits):
        image, place, exists = tile_rows(tile, positions, ROWS)
        exists &= first < end
        row = place.to(tl.int64)
        base, shift = tap_point(
            place, out_size, offset + image * offset_strides[0] + row * offset_strides[2], offset_strides[1],
            offset_group, tap, exists, TAPS, KERNEL, STRIDE, PADDING, DILATION, AXES,
        )  # fmt: skip
        known = defined(shift)
        masks = mask
        if MODULATED:
            masks += image * mask_strides[0] + row * mask_strides[2]
        factor = tap_factor(masks, mask_strides[1], offset_group * TAPS + tap, exists, MODULATED)
        samples = interpolate(
            zeros(ROWS, COLUMNS, PARTS), input + image * input_strides[0], input_strides[2],
            (columns, input_strides[1], end), size, locate(base, shift, size, AXES, BORDER),
            tl.where(known, factor, float("nan")), known & exists, AXES, BORDER, False, PARTS, WHOLE,
        )  # fmt: skip
        cotangents = grad_output + image * grad_output_strides[0] + row * grad_output_strides[2]
        more = ()
        if DEPTHWISE:
            for PART in tl.static_range(PARTS):
                channels = columns + PART * COLUMNS
                part = load_cotangent(
                    cotangents, grad_output_strides[1], channels * GROUP_FILTERS + block, exists, channels < end,
                    tl.float32,
                )  # fmt: skip
                more = more + (sums[PART] + tl.sum(samples[PART] * part, 0),)
        else:
            part = load_cotangent(
                cotangents, grad_output_strides[1], group * GROUP_FILTERS + outputs, exists, outputs < GROUP_FILTERS,
                OPERAND,
            )  # fmt: skip
            for PART in tl.static_range(PARTS):
                samples_of_part = tl.trans(samples[PART].to(OPERAND))
                more = more + (tl.dot(samples_of_part, part, sums[PART], input_precision=PRECISION),)
        sums = more

    partial += (split * TAPS + tap).to(tl.int64) * (GROUP_CHANNELS * FILTERS)
    for PART in tl.static_range(PARTS):
        channels = columns + PART * COLUMNS
        if DEPTHWISE:
            tl.store(partial + channels * GROUP_FILTERS + block, sums[PART], mask=channels < end)
        else:
            where = (channels - group * GROUP_CHANNELS)[:, None] * FILTERS + (group * GROUP_FILTERS + outputs)[None, :]
            mask_of_part = (channels < end)[:, None] & (outputs < GROUP_FILTERS)[None, :]
            tl.store(partial + where, sums[PART], mask=mask_of_part)
