"""``compat.grid_sample`` against torch's."""

from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate

OPTIONS = list(product(("bilinear", "nearest"), ("zeros", "border", "reflection"), (True, False)))


@pytest.mark.parametrize("mode, padding_mode, align_corners", OPTIONS)
@pytest.mark.parametrize("size", [(6, 7), (1, 5), (4, 3, 5)], ids=str)
def test_values_and_gradients_are_those_of_torch(
    size: tuple[int, ...], mode: str, padding_mode: str, align_corners: bool
) -> None:
    axes = len(size)
    input = torch.randn(2, 3, *size).double()
    # Far enough outside to be mirrored several times.
    grid = 4 * torch.randn(2, *(5, 4, 6)[:axes], axes).double()
    positions = [0, 1] if mode == "bilinear" else [0]
    options: dict[str, Any] = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    actual = evaluate(lambda x, g: dk.compat.grid_sample(x, g, **options), [input, grid], positions, torch.float64)
    expected = evaluate(lambda x, g: F.grid_sample(x, g, **options), [input, grid], positions, torch.float64)
    for name, one, truth in zip(("output", "input", "grid"), actual, expected, strict=False):
        assert_close(one, truth, name=name)


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_ties_of_the_nearest_pixel_are_those_of_torch(padding_mode: str) -> None:
    input = torch.arange(8.0).reshape(1, 1, 1, 8)
    pixel = torch.arange(-2.5, 10, 0.5)
    grid = torch.stack([(2 * pixel + 1) / 8 - 1, torch.zeros_like(pixel)], -1).reshape(1, 1, -1, 2)
    options: dict[str, Any] = {"mode": "nearest", "padding_mode": padding_mode, "align_corners": False}
    assert_equal(dk.compat.grid_sample(input, grid, **options), F.grid_sample(input, grid, **options))


def test_more_than_torch_accepts() -> None:
    input, grid = torch.randn(2, 3, 9).double(), torch.rand(2, 4, 5, 1).double() * 2 - 1
    assert_close(
        dk.compat.grid_sample(input, grid),
        F.grid_sample(input.unsqueeze(2), F.pad(grid, [0, 1]), align_corners=False),
    )


def test_bicubic_is_computed_by_torch() -> None:
    input, grid = torch.randn(2, 3, 6, 7), 2 * torch.rand(2, 4, 5, 2) - 1
    options: dict[str, Any] = {"mode": "bicubic", "padding_mode": "border", "align_corners": True}
    assert_equal(dk.compat.grid_sample(input, grid, **options), F.grid_sample(input, grid, **options))


def test_arguments_that_are_wrong() -> None:
    input, grid = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 3, 2)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"mode": "area"}, ValueError, "mode is 'area'"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode is 'wrap'"),
        ({"grid": torch.zeros(1, 3, 3, 3)}, ValueError, r"grid has shape .* it must be \[1, \*out, 2\]"),
        ({"grid": torch.zeros(2, 3, 3, 2)}, ValueError, r"grid has shape"),
        ({"input": torch.zeros(4, 4)}, ValueError, "input has shape"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            dk.compat.grid_sample(**{"input": input, "grid": grid, **change})
