"""Deformable aggregation against the published formulas of DCNv3 and DCNv4, and against F.grid_sample.

The published operators take images and have their taps in column-major order (x outside, y inside) and offsets as
(x, y). The loops below keep that convention, so that the comparison includes the change of order.
"""

from collections.abc import Callable
from itertools import product
from math import ceil, floor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.ops._shape import prod
from deformkit.ops.deform_aggregate.cases import CASES, Case

NAMES = ("output", "value", "offset", "weight")
PUBLISHED = [
    *(case for case in CASES if case.axes == 2 and case.boundary == "zeros"),
    Case("tall-without-centre", 1, (6, 5), 2, 3, (5, 3), (1, 2), (2, 0), (1, 2), 1.25, remove_center=True),
    Case("wide-without-centre", 2, (4, 5), 1, 2, (1, 5), 1, (1, 2), 1, 0.5, remove_center=True),
    Case("dilated", 1, (5, 6), 2, 2, (3, 2), 1, (3, 2), (3, 2), 0.75),
]


def published_order(kernel_size: tuple[int, int], remove_center: bool) -> list[int]:
    """The number in column-major order of each of our taps, which are in row-major order."""
    height, width = kernel_size
    taps = [(y, x) for y in range(height) for x in range(width)]
    by_column = sorted(taps, key=lambda tap: (tap[1], tap[0]))
    if remove_center:
        taps.remove((height // 2, width // 2))
        by_column.remove((height // 2, width // 2))
    return [by_column.index(tap) for tap in taps]


def aggregate_by_loops(
    value: Tensor,
    offset_at: Callable[[int, int, int, int, int], tuple[Tensor, Tensor]],
    weight_at: Callable[[int, int, int, int, int], Tensor],
    case: Case,
    named: dict[str, Any],
) -> Tensor:
    """The common part of DCNv3 and DCNv4 for a value ``[N, H, W, G, C]``, one position and one tap after the other.

    ``offset_at`` gives x and y, and ``weight_at`` the factor, for image, row, column, group and number of the tap.
    """
    kernel_h, kernel_w = case.kernel_size
    (stride_h, stride_w), (pad_h, pad_w) = named["stride"], named["padding"]
    (dilation_h, dilation_w), scale = named["dilation"], case.offset_scale
    images, height, width, groups, _ = value.shape
    rows = (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    half_h, half_w = dilation_h * (kernel_h - 1) // 2, dilation_w * (kernel_w - 1) // 2
    positions = []
    for image, row, column, group in product(range(images), range(rows), range(columns), range(groups)):
        start_x = half_w - pad_w + column * stride_w - half_w * scale
        start_y = half_h - pad_h + row * stride_h - half_h * scale
        total = torch.zeros_like(value[0, 0, 0, 0])
        tap = 0
        for i in range(kernel_w):
            for j in range(kernel_h):
                if case.remove_center and (i, j) == (kernel_w // 2, kernel_h // 2):
                    continue
                offset_x, offset_y = offset_at(image, row, column, group, tap)
                x = start_x + (i * dilation_w + offset_x) * scale
                y = start_y + (j * dilation_h + offset_y) * scale
                if -1 < x < width and -1 < y < height:
                    factor = weight_at(image, row, column, group, tap)
                    total = total + factor * bilinear(value[image, :, :, group], x, y)
                tap += 1
        positions.append(total)
    return torch.stack(positions).reshape(images, rows, columns, -1)


def bilinear(field: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The channels of ``field [H, W, C]`` at one point, zero outside."""
    left, top = floor(x.item()), floor(y.item())
    right_share, lower_share = x - left, y - top
    result = torch.zeros_like(field[0, 0])
    for column, share_x in ((left, 1 - right_share), (left + 1, right_share)):
        for row, share_y in ((top, 1 - lower_share), (top + 1, lower_share)):
            if 0 <= column < field.shape[1] and 0 <= row < field.shape[0]:
                result = result + field[row, column] * share_x * share_y
    return result


def published_tensors(case: Case, named: dict[str, Any]) -> list[Tensor]:
    """Value, offset and weight of the case as DCNv3 takes them, with flattened heads, channels and predictions."""
    order = published_order(case.kernel_size, case.remove_center)
    back = [order.index(tap) for tap in range(len(order))]
    offset = named["offset"][..., back, :].flip(-1).flatten(-3)
    return [named["value"].flatten(-2), offset, named["weight"][..., back].flatten(-2)]


def ours(case: Case, named: dict[str, Any], value: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """The operator of deformkit on tensors in the published layout."""
    order = published_order(case.kernel_size, case.remove_center)
    given = {
        "value": value.unflatten(-1, (case.heads, -1)),
        "offset": offset.unflatten(-1, (case.heads, -1, 2))[..., order, :].flip(-1),
        "weight": weight.unflatten(-1, (case.heads, -1))[..., order],
    }
    return dk.deform_aggregate(**{**named, **given}).flatten(-2)


def assert_agree(actual: list[Tensor], expected: list[Tensor], names: tuple[str, ...]) -> None:
    for name, one, other in zip(names, actual, expected, strict=True):
        assert other.any(), f"nothing to compare in {name}"
        assert_close(one, other, name=name)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: c.name)
def test_the_formula_of_dcnv3(case: Case) -> None:
    """Two tensors, offsets ``[N, H, W, G*K*2]`` and masks ``[N, H, W, G*K]``."""
    named = case.arguments(torch.float64)
    tensors = published_tensors(case, named)
    taps = prod(case.kernel_size) - case.remove_center

    def published(value: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        def offset_at(image: int, row: int, column: int, group: int, tap: int) -> tuple[Tensor, Tensor]:
            x = offset[image, row, column, (group * taps + tap) * 2]
            return x, offset[image, row, column, (group * taps + tap) * 2 + 1]

        def mask_at(image: int, row: int, column: int, group: int, tap: int) -> Tensor:
            return mask[image, row, column, group * taps + tap]

        return aggregate_by_loops(value.unflatten(-1, (case.heads, -1)), offset_at, mask_at, case, named)

    expected = evaluate(published, tensors, [0, 1, 2], torch.float64)
    assert_agree(evaluate(lambda *v: ours(case, named, *v), tensors, [0, 1, 2], torch.float64), expected, NAMES)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: c.name)
def test_the_formula_of_dcnv4(case: Case) -> None:
    """One tensor with 2K offsets, then K masks for each group, followed by zeros up to a multiple of 8."""
    named = case.arguments(torch.float64)
    value, offset, mask = published_tensors(case, named)
    taps = prod(case.kernel_size) - case.remove_center
    groups = (offset.unflatten(-1, (case.heads, -1)), mask.unflatten(-1, (case.heads, -1)))
    packed = torch.cat(groups, -1).flatten(-2)
    packed = F.pad(packed, (0, ceil(packed.shape[-1] / 8) * 8 - packed.shape[-1]))

    def published(value: Tensor, packed: Tensor) -> Tensor:
        def offset_at(image: int, row: int, column: int, group: int, tap: int) -> tuple[Tensor, Tensor]:
            x = packed[image, row, column, group * taps * 3 + tap * 2]
            return x, packed[image, row, column, group * taps * 3 + tap * 2 + 1]

        def mask_at(image: int, row: int, column: int, group: int, tap: int) -> Tensor:
            return packed[image, row, column, group * taps * 3 + taps * 2 + tap]

        return aggregate_by_loops(value.unflatten(-1, (case.heads, -1)), offset_at, mask_at, case, named)

    def unpacked(value: Tensor, packed: Tensor) -> Tensor:
        by_group = packed[..., : case.heads * taps * 3].unflatten(-1, (case.heads, -1))
        return ours(case, named, value, by_group[..., : 2 * taps].flatten(-2), by_group[..., 2 * taps :].flatten(-2))

    expected = evaluate(published, [value, packed], [0, 1], torch.float64)
    actual = evaluate(unpacked, [value, packed], [0, 1], torch.float64)
    assert_agree(actual, expected, ("output", "value", "packed offsets and masks"))


def by_grid_sample(case: Case, named: dict[str, Any], value: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """The formula with F.grid_sample, whose grid is x first, from -1 to 1; a sequence becomes an image of one row."""
    taps = list(product(*(range(k) for k in case.kernel_size)))
    if case.remove_center:
        del taps[len(taps) // 2]
    out_size = offset.shape[1:-3]
    coordinates = []
    for axis, (k, s, p, d) in enumerate(
        zip(case.kernel_size, named["stride"], named["padding"], named["dilation"], strict=True)
    ):
        centre = d * (k - 1) // 2
        origin = torch.arange(out_size[axis]) * s - p + centre
        origin = origin.reshape(-1, *[1] * (case.axes - 1 - axis), 1, 1)
        from_centre = torch.tensor([d * tap[axis] - centre for tap in taps])
        point = origin + case.offset_scale * (from_centre + offset[..., axis])
        coordinates.append((2 * point + 1) / case.size[axis] - 1)
    field = value.movedim(-2, 1).movedim(-1, 2).flatten(0, 1)
    if case.axes == 1:
        coordinates.insert(0, torch.zeros_like(coordinates[0]))
        field = field.unsqueeze(2)
    grid = torch.stack(coordinates[::-1], -1).movedim(-3, 1).flatten(0, 1)
    grid = grid.reshape(len(grid), -1, *[1] * (len(coordinates) - 2), len(taps), len(coordinates))
    samples = F.grid_sample(field, grid, padding_mode=case.boundary, align_corners=False)
    samples = samples.reshape(len(value), case.heads, -1, *out_size, len(taps)).movedim(2, -1).movedim(1, -3)
    return (samples * weight.unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_formula_with_grid_sample(case: Case) -> None:
    named = case.arguments(torch.float64)
    values = [named[name] for name in NAMES[1:]]
    expected = evaluate(lambda *v: by_grid_sample(case, named, *v), values, [0, 1, 2], torch.float64)

    def operator(*values: Tensor) -> Tensor:
        return dk.deform_aggregate(**{**named, **dict(zip(NAMES[1:], values, strict=True))})

    assert_agree(evaluate(operator, values, [0, 1, 2], torch.float64), expected, NAMES)
