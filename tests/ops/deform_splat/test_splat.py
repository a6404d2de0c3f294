"""Splatting against loops over values and corners, and what is said about wrong arguments."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops.deform_splat.cases import CASES, Case


def by_loops(input: Tensor, points: Tensor, size: tuple[int, ...], boundary: str) -> Tensor:
    """Every value added to every corner of its cell, point after point."""
    batch, groups, count, axes = points.shape
    result = torch.zeros(*input.shape[:2], *size, dtype=input.dtype)
    parts = []
    for b, g, i in product(range(batch), range(groups), range(count)):
        values, point = input[b].unflatten(0, (groups, -1))[g, :, i], points[b, g, i]
        if boundary == "border":
            point = torch.stack([x.clamp(0, length - 1) for x, length in zip(point, size, strict=True)])
        low = point.detach().floor()
        for corner in product((0, 1), repeat=axes):
            weight = torch.ones((), dtype=input.dtype)
            place = []
            for axis, upper in enumerate(corner):
                fraction = point[axis] - low[axis]
                weight = weight * (fraction if upper else 1 - fraction)
                pixel = int(low[axis]) + upper
                if boundary == "reflect":
                    while not 0 <= pixel < size[axis]:
                        pixel = -1 - pixel if pixel < 0 else 2 * size[axis] - 1 - pixel
                place.append(pixel)
            if all(0 <= pixel < length for pixel, length in zip(place, size, strict=True)):
                one = torch.zeros(batch, groups, input.shape[1] // groups, *size, dtype=input.dtype)
                one[(b, g, slice(None), *place)] = 1
                parts.append(one.flatten(1, 2) * (weight * values).repeat(groups).reshape(1, -1, *[1] * axes))
    return torch.stack([result, *parts]).sum(0)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch * c.channels < 30], ids=lambda case: case.name)
def test_formula(case: Case) -> None:
    named = case.arguments(torch.float64)
    values = [named["input"].flatten(2)[..., :9], named["points"].flatten(2, -2)[:, :, :9]]
    actual = evaluate(
        lambda x, p: dk.deform_splat(x, p, case.size, boundary=case.boundary), values, [0, 1], torch.float64
    )
    expected = evaluate(lambda x, p: by_loops(x, p, case.size, case.boundary), values, [0, 1], torch.float64)
    for name, one, other in zip(("output", "input", "points"), actual, expected, strict=True):
        assert_close(one, other, name=name)


def test_the_axes_of_the_input_are_free() -> None:
    input, points = torch.randn(2, 6, 4, 3, 2, 5), torch.rand(2, 3, 4, 3, 2, 5, 2) * 7
    result = dk.deform_splat(input, points, (6, 8))
    assert_equal(result, dk.deform_splat(input.flatten(2), points.flatten(2, -2), (6, 8)))
    single = dk.deform_splat(input[..., 0, 0, 0, 0], points[:, :, 0, 0, 0, 0], 6)
    assert_equal(single, dk.deform_splat(input[..., 0, 0, 0, :1], points[:, :, 0, 0, 0, :1], 6))


def test_integer_points_add_up_as_index_add() -> None:
    input, places = torch.randn(1, 5, 100).double(), torch.randint(0, 12, (100,))
    result = dk.deform_splat(input, places.double().reshape(1, 1, 100, 1), 12)
    assert_close(result, torch.zeros(1, 5, 12).double().index_add(2, places, input))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"input": [1.0]}, TypeError, "input is a list; it must be a torch.Tensor"),
    "points": ({"points": torch.zeros(2, 1, 4, 4, 2)}, ValueError, r"it must be \[B, G, 4, 5, N\] with 1, 2 or 3"),
    "coordinates": ({"points": torch.zeros(2, 1, 4, 5, 4)}, ValueError, "with 1, 2 or 3 coordinates N"),
    "half points": ({"points": torch.zeros(2, 1, 4, 5, 2).half()}, TypeError, "points has dtype torch.float16"),
    "size": ({"size": (3, 4, 5)}, ValueError, "size is .3, 4, 5.; points has 2 coordinates"),
    "no size": ({"size": (3, 0)}, ValueError, "size is .3, 0.; each value must be at least 1"),
    "huge size": ({"size": 2**31}, ValueError, "the output would have more than 2.62 elements"),
    "long size": ({"size": (2**41, 1)}, ValueError, r"size is \[2199023255552, 1\]; each value must be at most 2\^40"),
    "groups": ({"points": torch.zeros(2, 4, 4, 5, 2)}, ValueError, "points has 4 groups and input 6 channels"),
    "batch": ({"points": torch.zeros(1, 1, 4, 5, 2)}, ValueError, "points has batch size 1; input has 2"),
    "boundary": ({"boundary": "wrap"}, ValueError, "boundary is 'wrap'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    sound = {"input": torch.randn(2, 6, 4, 5), "points": torch.zeros(2, 1, 4, 5, 2), "size": (3, 4)}
    change, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        dk.deform_splat(**{**sound, **change})
