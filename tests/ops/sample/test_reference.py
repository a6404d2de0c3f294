"""The reference sampler is compared with torch.nn.functional.grid_sample and with values by hand."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deformkit._testing import assert_close, assert_equal
from deformkit.ops.sample.reference import sample

SIZES = {1: (7,), 2: (5, 8), 3: (4, 6, 3)}
boundaries = pytest.mark.parametrize("boundary", ["zeros", "border"])


def random_points(size: tuple[int, ...], count: int = 200) -> Tensor:
    """Points in and around a field, away from grid lines: ``[2, count, N]``."""
    points = torch.rand(2, count, len(size), dtype=torch.float64) * (torch.tensor(size) + 6) - 3
    return points.floor() + points.frac().abs().clamp(0.05, 0.95)


def grid_sample(field: Tensor, points: Tensor, boundary: str) -> Tensor:
    """grid_sample at points in pixels in tensor-axis order; a sequence becomes an image of one row."""
    size = torch.tensor(field.shape[2:])
    grid = ((2 * points + 1) / size - 1).flip(-1)
    if len(size) == 1:
        field, grid = field.unsqueeze(2), torch.cat([grid, torch.zeros_like(grid)], -1)
    grid = grid.reshape(grid.shape[0], *[1] * (field.dim() - 3), *grid.shape[1:])
    return F.grid_sample(field, grid, padding_mode=boundary, align_corners=False).flatten(2)


def at(field: Tensor, points: Tensor, boundary: str = "zeros") -> Tensor:
    return sample(field, torch.zeros(1, 1, points.shape[-1], dtype=torch.int64), points, boundary)


@boundaries
def test_values_and_gradients_are_those_of_grid_sample(axes: int, boundary: str) -> None:
    field = torch.randn(2, 3, *SIZES[axes], dtype=torch.float64, requires_grad=True)
    points = random_points(SIZES[axes]).requires_grad_()
    results = []
    for function in (at, grid_sample):
        value = function(field, points, boundary)
        results.append((value, *torch.autograd.grad((value * value.detach().cos()).sum(), (field, points))))
    for name, ours, theirs in zip(("value", "field gradient", "point gradient"), *results, strict=True):
        assert_close(ours, theirs, name=name)


@boundaries
def test_integer_points_read_the_element(axes: int, boundary: str) -> None:
    size = SIZES[axes]
    field = torch.randn(1, 2, *size)
    points = torch.cartesian_prod(*(torch.arange(float(s)) for s in size)).reshape(1, -1, axes)
    assert_equal(at(field, points, boundary), field.flatten(2))


@boundaries
def test_base_and_shift_are_one_sum(axes: int, boundary: str) -> None:
    field = torch.randn(2, 3, *SIZES[axes], dtype=torch.float64)
    points = random_points(SIZES[axes])
    base = torch.randint(-5, 6, points.shape)
    assert_close(sample(field, base, points - base, boundary), at(field, points, boundary))


def test_a_shift_keeps_its_precision_far_from_the_origin() -> None:
    far = 2**22
    field = torch.tensor([0.0, 1.0]).repeat(far // 2 + 8).reshape(1, 1, -1)
    shift = torch.tensor([0.1, 0.01, 1e-6]).reshape(1, 3, 1)
    value = sample(field, torch.tensor([far]), shift, "zeros")
    assert_close(value.flatten(), shift.flatten().double())


def test_zeros_fade_out_within_one_pixel_of_the_border() -> None:
    field = torch.tensor([[[10.0, 20.0, 30.0]]])
    points = torch.tensor([-1.0, -0.75, -0.5, 0.0, 2.0, 2.25, 3.0, 4.0]).reshape(1, -1, 1)
    assert at(field, points).flatten().tolist() == [0, 2.5, 5, 10, 30, 22.5, 0, 0]


def test_border_holds_the_last_element() -> None:
    field = torch.tensor([[[10.0, 20.0, 30.0]]])
    points = torch.tensor([-torch.inf, -7.0, -0.5, 0.5, 2.5, 1e30, torch.inf]).reshape(1, -1, 1)
    assert at(field, points, "border").flatten().tolist() == [10, 10, 10, 15, 30, 30, 30]


def slope(position: float, boundary: str) -> float:
    """The derivative by the position for the field 10, 20, 40."""
    point = torch.tensor([[[position]]], dtype=torch.float64, requires_grad=True)
    field = torch.tensor([[[10.0, 20.0, 40.0]]], dtype=torch.float64)
    (result,) = torch.autograd.grad(at(field, point, boundary).sum(), point)
    return result.item()


@pytest.mark.parametrize(
    ("position", "expected"),
    [(-1.5, 0), (-1.0, 10), (-0.5, 10), (0.0, 10), (0.5, 10), (1.0, 20), (1.5, 20), (2.0, -40), (2.5, -40), (3.0, 0)],
)
def test_on_a_grid_line_the_derivative_is_the_right_hand_one(position: float, expected: float) -> None:
    assert slope(position, "zeros") == expected


@pytest.mark.parametrize(
    ("position", "expected"), [(-1.0, 0), (-0.5, 0), (0.0, 10), (0.5, 10), (1.0, 20), (2.0, 0), (2.5, 0)]
)
def test_beyond_the_border_the_derivative_is_zero(position: float, expected: float) -> None:
    assert slope(position, "border") == expected
