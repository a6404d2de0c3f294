"""Random calls of the operators: shapes, steps, dtypes, layouts and wild offsets; and calls with something wrong."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WILD = (
    *(torch.inf, -torch.inf, 1e30, -1e30, 1e5, -1e5, 3e9, -3e9),
    *(2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 0.0, -0.0, -1.0, 1.0, 0.5, 1e-30, 1e-45),
)


@dataclass
class Call:
    """Arguments of an operator, and whether one of its coordinates is NaN."""

    operator: str
    args: list[Any]
    undefined: bool


def window(draw: random.Random, axes: int) -> tuple[tuple[int, ...], ...]:
    """The sizes of a field, a kernel, a stride, a padding and a dilation that have an output."""

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randint(least, most) for _ in range(axes))

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 4), each(1, 3)
    extra = each(0, {1: 40, 2: 10, 3: 4}[axes])
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + e for k, p, d, e in zip(kernel, padding, dilation, extra, strict=True)
    )
    return size, kernel, stride, padding, dilation


def wild_offset(draw: random.Random, offset: Tensor) -> Tensor:
    """``offset`` with some wild values, and perhaps in float32 if it is in half precision."""
    if offset.dtype in (torch.float16, torch.bfloat16) and draw.random() < 0.5:
        offset = offset.float()
    return sprinkle(draw, offset, (*WILD, torch.nan) if draw.random() < 0.2 else WILD)


def ordered(name: str, named: dict[str, Any]) -> list[Any]:
    """The arguments of the operator ``name``; deformkit is imported late, when the library under test is chosen."""
    from deformkit.ops._operator import operators

    return operators[name].ordered(named)


def deform_conv(draw: random.Random) -> Call:
    """A call of deformable convolution that has an output."""
    from deformkit.ops.deform_conv.cases import Case

    axes = draw.choice((1, 2, 2, 3))

    size, kernel, stride, padding, dilation = window(draw, axes)
    groups, offset_groups = draw.choice(((1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (8, 8), (5, 1)))
    channels = lcm(groups, offset_groups) * draw.choice((1, 2, 5, 16))
    if draw.random() < 0.004:  # a field that exceeds a kernel's buffer, with few points
        positions, channels = draw.choice(((80_000, 36), (300_000, 18), (2_200_000, 2)))
        groups, offset_groups = draw.choice(((1, 1), (2, 1), (1, 2), (2, 2)))
        size = tuple(round(positions ** (1 / axes)) + draw.randint(0, 9) for _ in range(axes))
        stride = tuple(max(1, s // draw.randint(2, {1: 300, 2: 20, 3: 6}[axes])) for s in size)
    case = Case(
        "fuzz",
        draw.choice((0, 1, 1, 2, 3, 9)) if channels * prod(size) < 200_000 else 1,
        channels,
        size,
        groups * draw.choice((1, 2, 7)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        modulated=draw.random() < 0.5,
        bias=draw.random() < 0.5,
        boundary=draw.choice(("zeros", "border")),
        offset_std=draw.choice((0.0, 0.5, 2.0, 20.0, 1000.0)),
    )
    dtype = draw.choice(DTYPES)
    named = case.arguments(dtype, seed=draw.getrandbits(30))
    named["offset"] = wild_offset(draw, named["offset"])
    return Call("deform_conv", ordered("deform_conv", named), bool(named["offset"].isnan().any()))


def deform_aggregate(draw: random.Random) -> Call:
    """A call of deformable aggregation that has an output."""
    from deformkit.ops.deform_aggregate.cases import Case

    axes = draw.choice((1, 2, 2, 3))

    size, kernel, stride, padding, dilation = window(draw, axes)
    heads, channels = draw.choice((1, 2, 3, 8)), draw.choice((1, 2, 3, 5, 8, 16, 17, 32, 40))
    batch = draw.choice((0, 1, 1, 2, 3, 9))
    if draw.random() < 0.004:  # a field that exceeds a kernel's buffer, with few points
        positions, heads, channels = draw.choice(((80_000, 4, 9), (300_000, 2, 9), (2_200_000, 1, 2)))
        batch, size = 1, tuple(round(positions ** (1 / axes)) + draw.randint(0, 9) for _ in range(axes))
        stride = tuple(max(1, s // draw.randint(2, {1: 300, 2: 20, 3: 6}[axes])) for s in size)
    case = Case(
        "fuzz",
        batch,
        size,
        heads,
        channels,
        kernel,
        stride,
        padding,
        dilation,
        # With powers of two, points on grid lines stay there in float32 and in float64.
        offset_scale=draw.choice((1.0, 1.0, 2.0, 0.5, -0.25)),
        remove_center=all(k % 2 for k in kernel) and max(kernel) > 1 and draw.random() < 0.5,
        boundary=draw.choice(("zeros", "border")),
        offset_std=draw.choice((0.0, 0.5, 2.0, 20.0, 1000.0)),
    )
    dtype = draw.choice(DTYPES)
    named = case.arguments(dtype, seed=draw.getrandbits(30))
    named["offset"] = wild_offset(draw, named["offset"])
    return Call("deform_aggregate", ordered("deform_aggregate", named), bool(named["offset"].isnan().any()))


def ms_deform_attn(draw: random.Random) -> Call:
    """A call of multi-scale deformable attention."""
    from deformkit.ops.ms_deform_attn.cases import Case

    axes = draw.choice((1, 2, 2, 3))
    levels = draw.randint(1, 4)
    most = {1: 60, 2: 12, 3: 6}[axes]
    sizes = tuple(tuple(draw.randint(1, most) for _ in range(axes)) for _ in range(levels))
    points = [draw.choice((0, 1, 2, 4, 5)) for _ in range(levels)]
    points[draw.randrange(levels)] += 1
    batch, queries = draw.choice((0, 1, 1, 2, 3, 9)), draw.choice((0, 1, 2, 7, 33, 150))
    heads, channels = draw.choice((1, 2, 3, 8)), draw.choice((1, 2, 3, 5, 8, 16, 17, 32, 40))
    if draw.random() < 0.004:  # a field that exceeds a kernel's buffer, with few points
        positions, heads, channels = draw.choice(((80_000, 2, 32), (100_000, 4, 9), (100_000, 3, 16)))
        batch, sizes = 1, ((round(positions ** (1 / axes)),) * axes, *sizes[1:])
    case = Case(
        "fuzz",
        batch,
        sizes,
        queries,
        heads,
        channels,
        tuple(points),
        mode=draw.choice(("linear", "linear", "nearest")),
        reach=draw.choice((0.0, 1.5, 100.0)),
        near=draw.choice((None, 2.0)) if queries <= sum(map(prod, sizes)) else None,
    )
    named = case.arguments(draw.choice(DTYPES), seed=draw.getrandbits(30))
    undefined = draw.random() < 0.2
    locations = sprinkle(draw, named["sampling_locations"], (*WILD, torch.nan) if undefined else WILD)
    named["sampling_locations"] = locations
    return Call("ms_deform_attn", ordered("ms_deform_attn", named), bool(locations.isnan().any()))


def deform_roi_pool(draw: random.Random) -> Call:
    """A call of deformable RoI pooling whose adaptive numbers of samples stay small on images and volumes."""
    from deformkit.ops.deform_roi_pool.cases import Case

    axes = draw.choice((1, 2, 2, 3))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randint(least, most) for _ in range(axes))

    size, channels = each(1, {1: 60, 2: 14, 3: 6}[axes]), draw.choice((1, 2, 3, 5, 8, 16, 17, 32, 40))
    batch, rois = draw.choice((0, 1, 1, 2, 3, 9)), draw.choice((0, 1, 2, 7, 20))
    if draw.random() < 0.004:  # a field that exceeds a kernel's buffer, with few points
        positions, channels = draw.choice(((80_000, 36), (300_000, 18), (2_200_000, 2)))
        batch, size = 1, tuple(round(positions ** (1 / axes)) + draw.randint(0, 9) for _ in range(axes))
    case = Case(
        "fuzz",
        max(batch, 1),
        channels,
        size,
        rois if batch else 0,
        each(1, {1: 9, 2: 4, 3: 3}[axes]),
        draw.choice((1.0, 0.5, 1 / 16, 3.0)),
        draw.choice((0, 0, 1, 2, 3)),
        draw.choice((0.1, 0.5, 1.0, -0.3)),
        with_offset=draw.random() < 0.8,
        bin_size=draw.choice((1.0, 2.5, 4.0)),
        spread=draw.choice((-0.5, 0.0, 0.5, 1.5)),
        group_size=each(1, 3) if channels < 18 and draw.random() < 0.3 else (),
    )
    dtype = draw.choice(DTYPES)
    named = case.arguments(dtype, seed=draw.getrandbits(30))
    named["input"] = named["input"][:batch]
    undefined = draw.random() < 0.2
    if case.with_offset:
        if dtype in (torch.float16, torch.bfloat16) and draw.random() < 0.5:
            named["offset"] = named["offset"].float()
        named["offset"] = sprinkle(draw, named["offset"], (*WILD, torch.nan) if undefined else WILD)
    if undefined:  # and so are infinite lengths and shifts
        # All on one side: between two infinities a point may lie anywhere, as rounding decides.
        far = (torch.inf, torch.nan, 3e9, 1e30, 2.0**31, 2.0**63)[: None if case.sampling_ratio or axes == 1 else 2]
        sign = draw.choice((1, -1))
        named["rois"][:, 1:] = sprinkle(draw, named["rois"][:, 1:], tuple(sign * value for value in far))
    return Call("deform_roi_pool", ordered("deform_roi_pool", named), undefined)


def deform_conv_transpose(draw: random.Random) -> Call:
    """A call of the transposed deformable convolution that has an output."""
    from deformkit.ops.deform_conv_transpose.cases import Case

    axes = draw.choice((1, 2, 2, 3))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randint(least, most) for _ in range(axes))

    kernel, stride, dilation, size = each(1, 3), each(1, 3), each(1, 3), each(1, {1: 30, 2: 8, 3: 4}[axes])
    extra = tuple(draw.randint(0, s - 1) for s in stride)
    whole = [(n - 1) * s + d * (k - 1) + e for n, s, d, k, e in zip(size, stride, dilation, kernel, extra, strict=True)]
    groups, offset_groups = draw.choice(((1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (8, 8), (5, 1)))
    case = Case(
        "fuzz",
        draw.choice((0, 1, 1, 2, 3, 9)),
        groups * draw.choice((1, 2, 7)),
        size,
        lcm(groups, offset_groups) * draw.choice((1, 2, 5)),
        kernel,
        stride,
        padding=tuple(draw.randint(0, n // 2) for n in whole),
        output_padding=extra,
        groups=groups,
        dilation=dilation,
        offset_groups=offset_groups,
        modulated=draw.random() < 0.5,
        boundary=draw.choice(("zeros", "border")),
        offset_std=draw.choice((0.0, 0.5, 2.0, 20.0, 1000.0)),
    )
    named = case.arguments(draw.choice(DTYPES), seed=draw.getrandbits(30))
    named["offset"] = wild_offset(draw, named["offset"])
    undefined = bool(named["offset"].isnan().any())
    return Call("deform_conv_transpose", ordered("deform_conv_transpose", named), undefined)


def deform_correlate(draw: random.Random) -> Call:
    """A call of the deformable correlation."""
    from deformkit.ops.deform_correlate.cases import Case

    axes = draw.choice((1, 2, 2, 3))
    most = {1: 60, 2: 12, 3: 6}[axes]
    sizes = tuple(tuple(draw.randint(1, most) for _ in range(axes)) for _ in range(draw.randint(1, 4)))
    points = [draw.choice((0, 1, 2, 4, 5)) for _ in sizes]
    points[draw.randrange(len(sizes))] += 1
    case = Case(
        "fuzz",
        draw.choice((0, 1, 1, 2, 3, 9)),
        sizes,
        draw.choice((0, 1, 2, 7, 33, 150)),
        draw.choice((1, 2, 3, 8)),
        draw.choice((1, 2, 3, 5, 8, 16, 17, 32, 40)),
        tuple(points),
        mode=draw.choice(("linear", "linear", "nearest")),
        reach=draw.choice((0.0, 1.5, 100.0)),
    )
    named = case.arguments(draw.choice(DTYPES), seed=draw.getrandbits(30))
    undefined = draw.random() < 0.2
    locations = sprinkle(draw, named["sampling_locations"], (*WILD, torch.nan) if undefined else WILD)
    named["sampling_locations"] = locations
    return Call("deform_correlate", ordered("deform_correlate", named), bool(locations.isnan().any()))


def deform_sample(draw: random.Random) -> Call:
    """A call of deformable sampling."""
    from deformkit.ops.deform_sample.cases import Case

    axes = draw.choice((1, 2, 2, 3))

    def each(most: int) -> tuple[int, ...]:
        return tuple(draw.randint(1, most) for _ in range(axes))

    groups = draw.choice((1, 1, 2, 3))
    batch, channels = draw.choice((0, 1, 1, 2, 3, 9)), groups * draw.choice((1, 2, 3, 5, 8, 16, 17, 40))
    size, out_size = each({1: 60, 2: 12, 3: 6}[axes]), each({1: 300, 2: 25, 3: 9}[axes])
    if draw.random() < 0.1:
        out_size = (0,) * axes
    if draw.random() < 0.02:  # a field that is cut into windows, or that a kernel does not hold whole
        positions, groups, channels = draw.choice(((80_000, 1, 9), (300_000, 2, 4), (600_000, 1, 8), (2_200_000, 1, 2)))
        batch, size = 1, tuple(round(positions ** (1 / axes)) + draw.randint(0, 9) for _ in range(axes))
        out_size = tuple(max(1, s // draw.randint(1, {1: 300, 2: 20, 3: 6}[axes])) for s in size)
    case = Case(
        "fuzz",
        batch,
        channels,
        size,
        out_size,
        groups,
        draw.choice(("zeros", "border", "reflect")),
        draw.choice(("linear", "linear", "nearest")),
        draw.choice((None, 0.0, 0.5, 20.0, 1000.0)),
    )
    named = case.arguments(draw.choice(DTYPES), seed=draw.getrandbits(30))
    undefined = draw.random() < 0.2
    named["points"] = sprinkle(draw, named["points"], (*WILD, torch.nan) if undefined else WILD)
    return Call("deform_sample", ordered("deform_sample", named), bool(named["points"].isnan().any()))


def deform_splat(draw: random.Random) -> Call:
    """A call of splatting."""
    from deformkit.ops.deform_splat.cases import Case

    axes = draw.choice((1, 2, 2, 3))

    def each(most: int) -> tuple[int, ...]:
        return tuple(draw.randint(1, most) for _ in range(axes))

    groups = draw.choice((1, 1, 2, 3))
    in_size, size = each({1: 300, 2: 25, 3: 9}[axes]), each({1: 60, 2: 12, 3: 6}[axes])
    if draw.random() < 0.1:
        in_size = (0,) * axes
    case = Case(
        "fuzz",
        draw.choice((0, 1, 1, 2, 3, 9)),
        groups * draw.choice((1, 2, 3, 5, 8, 16, 17, 40)),
        in_size,
        size,
        groups,
        draw.choice(("zeros", "border", "reflect")),
        draw.choice((None, 0.0, 0.5, 20.0, 1000.0)),
    )
    named = case.arguments(draw.choice(DTYPES), seed=draw.getrandbits(30))
    undefined = draw.random() < 0.2
    named["points"] = sprinkle(draw, named["points"], (*WILD, torch.nan) if undefined else WILD)
    return Call("deform_splat", ordered("deform_splat", named), bool(named["points"].isnan().any()))


# One generator for each operator.
GENERATORS: dict[str, Callable[[random.Random], Call]] = {
    "deform_aggregate": deform_aggregate,
    "deform_conv": deform_conv,
    "deform_conv_transpose": deform_conv_transpose,
    "deform_correlate": deform_correlate,
    "deform_roi_pool": deform_roi_pool,
    "deform_sample": deform_sample,
    "deform_splat": deform_splat,
    "ms_deform_attn": ms_deform_attn,
}


def sprinkle(draw: random.Random, values: Tensor, specials: tuple[float, ...]) -> Tensor:
    """Replace some of ``values``, or none, or all."""
    share = draw.choice((0.0, 0.0, 0.05, 0.5, 1.0))
    which = torch.tensor(specials, dtype=torch.float64)[torch.randint(len(specials), values.shape)]
    return torch.where(torch.rand(values.shape) < share, which.to(values.dtype), values)


def relayout(draw: random.Random, value: Any) -> Any:
    """The same values with other strides, or from the middle of a storage."""
    if not isinstance(value, Tensor) or draw.random() < 0.5:
        return value
    order = list(range(value.dim()))
    draw.shuffle(order)
    back = [order.index(axis) for axis in range(value.dim())]
    padded = torch.nn.functional.pad(value.permute(order), [draw.randint(0, 2), draw.randint(0, 2)], value=torch.nan)
    start = padded.shape[-1] - value.shape[order[-1]]
    low = draw.randint(0, start)
    kept = padded.narrow(-1, low, value.shape[order[-1]]).permute(back)
    return kept.copy_(value)


def spoil(draw: random.Random, args: list[Any], devices: Sequence[str] = ("meta",)) -> list[Any]:
    """Change a shape or a dtype, move a tensor to one of ``devices``, or drop or add a step.

    The call has to be refused or computed correctly.
    """
    args = list(args)
    i = draw.choice([i for i, value in enumerate(args) if isinstance(value, Tensor | list)])
    if isinstance(args[i], list):
        args[i] = draw.choice(([], [*args[i], 1], [0] * len(args[i]), [-1] * len(args[i]), [2**40] * len(args[i])))
    else:
        axis = draw.randrange(args[i].dim())
        size = args[i].shape[axis]
        args[i] = draw.choice(
            (
                args[i].narrow(axis, 0, max(size - 1, 0)),
                torch.cat([args[i], args[i]], axis),
                args[i].unsqueeze(axis),
                args[i].select(axis, 0) if size else args[i].flatten(),
                args[i].to(torch.float64 if args[i].dtype != torch.float64 else torch.float32),
                args[i].to(draw.choice((torch.float16, torch.int64, torch.bool, torch.complex64))),
                *(args[i].to(device) for device in devices),
            )
        )
    return args
