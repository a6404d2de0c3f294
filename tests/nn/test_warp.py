"""Layers that move a field: warping, and splatting with weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate

SIZE = (7, 6, 5)
LAYERS = {1: dk.nn.Warp1d, 2: dk.nn.Warp2d, 3: dk.nn.Warp3d}


def fields(axes: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """An input and a displacement that keeps clear of grid lines."""
    displacement = torch.randn(2, axes, *SIZE[:axes], dtype=torch.float64) * spread
    whole = displacement.floor()
    return torch.randn(2, 3, *SIZE[:axes]).double(), whole + (displacement - whole).clamp(0.05, 0.95)


def by_grid_sample(input: Tensor, displacement: Tensor, padding_mode: str) -> Tensor:
    """A sequence is an image one column wide."""
    axes = input.dim() - 2
    along = [torch.arange(n, dtype=input.dtype) for n in input.shape[2:]]
    place = torch.stack(torch.meshgrid(*along, indexing="ij")) + displacement
    grid = [(2 * place[:, n] + 1) / input.shape[2 + n] - 1 for n in range(axes)]
    if axes == 1:
        input, grid = input.unsqueeze(-1), [grid[0].unsqueeze(-1), torch.zeros_like(grid[0]).unsqueeze(-1)]
    result = F.grid_sample(input, torch.stack(grid[::-1], -1), padding_mode=padding_mode, align_corners=False)
    return result.squeeze(-1) if axes == 1 else result


@pytest.mark.parametrize("boundary", ["zeros", "border", "reflect"])
def test_warp_is_sampling_at_moved_positions(axes: int, boundary: Any) -> None:
    other = {"reflect": "reflection"}.get(boundary, boundary)
    values = list(fields(axes))
    actual = evaluate(LAYERS[axes](boundary), values, [0, 1], torch.float64)
    expected = evaluate(lambda x, d: by_grid_sample(x, d, other), values, [0, 1], torch.float64)
    for name, one, truth in zip(("output", "input", "displacement"), actual, expected, strict=True):
        assert_close(one, truth, name=name)


def test_warp_by_whole_pixels_is_a_shift(axes: int) -> None:
    input = torch.randn(2, 3, *SIZE[:axes])
    displacement = torch.zeros(2, axes, *SIZE[:axes])
    displacement[:, 0] = 1
    for layer in (LAYERS[axes](), LAYERS[axes](mode="nearest")):
        assert_equal(layer(input, displacement)[:, :, :-1], input[:, :, 1:])
        assert_equal(layer(input.half(), displacement.half()), layer(input.half(), displacement))
    assert repr(LAYERS[axes]("border")) == f"Warp{axes}d(boundary='border', mode='linear')"


def splatted(input: Tensor, flow: Tensor) -> Tensor:
    """A dense matrix of the weights of every pixel at every place, times the pixels."""
    size = input.shape[2:]
    along = [torch.arange(n, dtype=input.dtype) for n in size]
    place = torch.stack(torch.meshgrid(*along, indexing="ij"))
    distance = place.flatten(1).unsqueeze(2) - (place + flow).flatten(2).unsqueeze(2)
    weight = (1 - distance.abs()).clamp(min=0).prod(1)
    return (input.flatten(2) @ weight.transpose(1, 2)).unflatten(2, size)


def by_formula(mode: str, input: Tensor, flow: Tensor, metric: Tensor) -> Tensor:
    weight = {"linear": metric, "soft": metric.exp()}.get(mode, torch.ones_like(metric))
    total_values = splatted(input * weight, flow)
    if mode == "summation":
        return total_values
    total = splatted(weight, flow)
    return torch.where(total == 0, 0.0, total_values / torch.where(total == 0, 1.0, total))


@pytest.mark.parametrize("mode", ["summation", "average", "linear", "soft"])
def test_splat_is_its_formula(axes: int, mode: Any) -> None:
    input, flow = fields(axes)
    metric = torch.rand(2, 1, *SIZE[:axes], dtype=torch.float64) + 0.5
    weighted = mode in ("linear", "soft")
    layer = dk.nn.SoftmaxSplat(mode)
    values, positions = [input, flow, metric], [0, 1, 2] if weighted else [0, 1]
    actual = evaluate(lambda x, f, m: layer(x, f, m if weighted else None), values, positions, torch.float64)
    expected = evaluate(lambda *v: by_formula(mode, *v), values, positions, torch.float64)
    for name, one, truth in zip(("output", "input", "flow", "metric"), actual, expected, strict=False):
        assert_close(one, truth, name=name)


def test_a_large_metric_covers_and_does_not_overflow() -> None:
    input = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3)
    flow = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 1, 3)
    metric = torch.tensor([1000.0, 900.0, 950.0]).reshape(1, 1, 3)
    assert_equal(dk.nn.SoftmaxSplat()(input, flow, metric), torch.tensor([[[0.0, 1.0, 3.0]]]))


WRONG: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "axes": (dk.nn.Warp2d(), (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)), ValueError, "input has shape .*4 axes"),
    "empty": (dk.nn.Warp1d(), (torch.zeros(1, 2, 0), torch.zeros(1, 1, 0)), ValueError, "input has spatial size 0"),
    "size": (
        dk.nn.Warp2d(),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3)),
        ValueError,
        r"displacement has shape \[1, 2, 4, 3\].*it must be \[1, 2, 3, 4\]",
    ),
    "dtype": (dk.nn.Warp1d(), (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3).double()), TypeError, "displacement has"),
    "no metric": (dk.nn.SoftmaxSplat(), (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)), ValueError, "metric is None"),
    "a metric": (
        dk.nn.SoftmaxSplat("average"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)),
        ValueError,
        'metric must be None in mode "average"',
    ),
    "metric": (
        dk.nn.SoftmaxSplat("linear"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), torch.zeros(1, 2, 3)),
        ValueError,
        r"metric has shape \[1, 2, 3\]; .* it must be \[1, 1, 3\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    layer, args, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        layer(*args)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="boundary is 'wrap'"):
        dk.nn.Warp2d("wrap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'max'"):
        dk.nn.SoftmaxSplat("max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Warp2d.forward\(\) missing 1 required positional argument: 'displacement'"):
        dk.nn.Warp2d()(torch.zeros(1, 1, 2, 2))
