"""Deformable sampling against ``torch.nn.functional.grid_sample``: values and every gradient, on images and volumes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close

PADDING = {"zeros": "zeros", "border": "border", "reflect": "reflection"}


def normalised(points: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    """Points in pixels as grid_sample takes them."""
    extent = torch.tensor(size, dtype=points.dtype)
    scaled = 2 * points / (extent - 1) - 1 if align_corners else (2 * points + 1) / extent - 1
    return scaled.flip(-1)


# With align_corners grid_sample mirrors at the centres of the end pixels.
@pytest.mark.parametrize(
    ("boundary", "align_corners"),
    [*((boundary, False) for boundary in PADDING), ("zeros", True), ("border", True)],
    ids=str,
)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("size", [(7, 5), (4, 6, 3), (2, 9)], ids=str)
def test_values_and_gradients(size: tuple[int, ...], boundary: str, mode: str, align_corners: bool) -> None:
    axes = len(size)
    input = torch.randn(2, 9, *size, dtype=torch.float64, requires_grad=True)
    # Far outside too; not where derivatives, or the nearest pixel, change.
    points = torch.rand(2, *[5] * axes, axes, dtype=torch.float64) * 12 * torch.tensor(size) - 5 * torch.tensor(size)
    points = ((2 * points).floor() + (2 * points - (2 * points).floor()).clamp(0.1, 0.9)) / 2
    points.requires_grad_()
    ours = dk.deform_sample(input, points.unsqueeze(1), boundary=boundary, mode=mode)
    theirs = F.grid_sample(
        input,
        normalised(points, size, align_corners),
        "nearest" if mode == "nearest" else "bilinear",
        PADDING[boundary],
        align_corners,
    )
    assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for one, other in zip(
        *(torch.autograd.grad(output, [input, points], cotangent) for output in (ours, theirs)), strict=True
    ):
        assert_close(one, other)


def test_where_two_pixels_are_equally_near() -> None:
    """The pixel to the right, where grid_sample takes the even one."""
    input = torch.arange(6.0).reshape(1, 1, 1, 6)
    points = torch.tensor([[0.0, x] for x in (0.5, 1.5, 2.5, 4.5)]).reshape(1, 1, 1, 4, 2)
    assert dk.deform_sample(input, points, mode="nearest").flatten().tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize("boundary", PADDING)
def test_autocast_keeps_positions_that_a_half_cannot(boundary: str) -> None:
    """Points are float32 whatever the dtype of the values: in bfloat16 those above 256 would be even ones."""
    input = torch.arange(2000.0).remainder(7).reshape(1, 1, 2000)
    points = torch.arange(2000.0).reshape(1, 1, 2000, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dk.deform_sample(input, points, boundary=boundary)
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), input)
    with pytest.raises(TypeError, match="in half precision a location may be off"):
        dk.deform_sample(input.bfloat16(), points.bfloat16(), boundary=boundary)
