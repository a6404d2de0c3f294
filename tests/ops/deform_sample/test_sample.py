"""Deformable sampling: its agreement with torch's grid sampling, and its own semantics."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

PADDING = {"zeros": "zeros", "border": "border", "reflect": "reflection"}
SIZES = {2: (6, 9), 3: (4, 5, 7)}


def field_and_points(axes: int, count: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A field with 5 channels, and points in it and up to three times its size outside."""
    size = torch.tensor(SIZES[axes])
    points = (torch.rand(2, 1, *count, axes, dtype=dtype) - 0.4) * 4 * size
    return torch.randn(2, 5, *SIZES[axes], dtype=dtype), points


def grid_of(points: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    """Points in pixels as those of :func:`torch.nn.functional.grid_sample`: from -1 to 1, x first."""
    lengths = torch.tensor(size, dtype=points.dtype)
    scaled = 2 * points / (lengths - 1) - 1 if align_corners else (2 * points + 1) / lengths - 1
    return scaled.flip(-1).squeeze(1)


@pytest.mark.parametrize("boundary", PADDING)
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_agrees_with_grid_sample(axes: int, boundary: Any, mode: Any) -> None:
    """The values and both gradients; grid_sample reflects at the edges of pixels without ``align_corners`` alone."""
    input, points = (t.requires_grad_() for t in field_and_points(axes, (3, 40, 2)[:axes]))
    cotangent = torch.randn(2, 5, *points.shape[2:-1], dtype=torch.float64)
    theirs = "bilinear" if mode == "linear" else "nearest"
    output = dk.deform_sample(input, points, boundary=boundary, mode=mode)
    found = torch.autograd.grad(output, (input, points), cotangent)
    for align_corners in (False, True) if boundary != "reflect" else (False,):
        grid = grid_of(points, SIZES[axes], align_corners)
        expected = F.grid_sample(input, grid, theirs, PADDING[boundary], align_corners)
        assert_close(output.detach(), expected.detach())
        wanted = torch.autograd.grad(expected, (input, points), cotangent, allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_reflection_repeats_the_mirrored_field(axes: int) -> None:
    """Reflected points lie in a field to which its mirror images are joined."""
    input = torch.randn(1, 9, *(4, 3, 2)[:axes], dtype=torch.float64)
    whole, middle = input, torch.tensor((4.0, 3.0, 2.0)[:axes], dtype=torch.float64)
    for axis in range(2, axes + 2):
        whole = torch.cat([whole.flip(axis), whole, whole.flip(axis)], axis)
    points = torch.rand(1, 1, 200, axes, dtype=torch.float64) * (3 * middle - 1) - middle
    expected = dk.deform_sample(whole, points + middle)
    assert_close(dk.deform_sample(input, points, boundary="reflect"), expected)


@pytest.mark.parametrize("channels", [1, 8, 40])
@pytest.mark.parametrize("boundary", PADDING)
def test_special_coordinates(channels: int, boundary: Any) -> None:
    """A NaN coordinate gives NaN; infinite ones and those far away are outside, or at the edge, or mirrored."""
    input = torch.randn(1, channels, 5, 6)
    points = torch.tensor([[float("nan"), 1], [float("inf"), 1], [1, -float("inf")], [1e30, -1e30], [2.0**40, 2]])
    points = points.reshape(1, 1, -1, 2).requires_grad_()
    output = dk.deform_sample(input, points, boundary=boundary)
    assert output[..., 0].isnan().all() and output[..., 1:].isfinite().all()
    (grad,) = torch.autograd.grad(output.nan_to_num().sum(), points)
    assert grad[0, 0, 0].isnan().all() and not grad[0, 0, 1:3].isnan().any()
    if boundary == "zeros":
        assert not output[..., 1:].any()
    if boundary == "border":
        assert_equal(output[..., 1], input[..., 4, 1])


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 1, 3, 2)])
def test_points_of_any_rank(shape: tuple[int, ...]) -> None:
    input, points = torch.randn(2, 6, 8), torch.rand(2, 3, *shape, 1) * 8
    output = dk.deform_sample(input, points)
    assert output.shape == (2, 6, *shape)
    assert_equal(output.reshape(2, 6, -1), dk.deform_sample(input, points.reshape(2, 3, -1, 1)))


def test_groups_have_points_of_their_own() -> None:
    input, points = torch.randn(2, 6, 5, 4), torch.rand(2, 3, 10, 2) * 4
    parts = [dk.deform_sample(input[:, 2 * g : 2 * g + 2], points[:, g : g + 1]) for g in range(3)]
    assert_close(dk.deform_sample(input, points), torch.cat(parts, 1).double())


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "axes": ({"points": torch.zeros(2, 1, 4, 3)}, ValueError, r"points has shape \[2, 1, 4, 3\]"),
    "batch": ({"points": torch.zeros(3, 1, 4, 2)}, ValueError, "points has batch size 3; input has 2"),
    "groups": ({"points": torch.zeros(2, 4, 4, 2)}, ValueError, "points has 4 groups and input 6 channels"),
    "half": ({"points": torch.zeros(2, 1, 4, 2).half()}, TypeError, "points has dtype torch.float16"),
    "double": ({"points": torch.zeros(2, 1, 4, 2).double()}, TypeError, "points has dtype torch.float64"),
    "empty": ({"input": torch.zeros(2, 6, 0, 4)}, ValueError, "input has spatial size 0x4"),
    "boundary": ({"boundary": "reflection"}, ValueError, "boundary is 'reflection'"),
    "mode": ({"mode": "bilinear"}, ValueError, "mode is 'bilinear'"),
    "tensor": ({"points": [[0.0, 0.0]]}, TypeError, "points"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    named: dict[str, Any] = {"input": torch.zeros(2, 6, 3, 4), "points": torch.zeros(2, 1, 4, 2), **change}
    with pytest.raises(error, match=message):
        dk.deform_sample(**named)
