"""Multi-scale deformable attention is compared with other implementations: values and every gradient."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops.ms_deform_attn.cases import Case

NAMES = ("output", "value", "sampling_locations", "attention_weights")
TENSORS = NAMES[1:]


def draw(seed: int, axes: int, **fixed: Any) -> Case:
    """A random configuration: levels, sizes, heads, channels and points."""
    source = random.Random(f"{seed} {axes}")
    levels = source.randint(1, 4)
    most = {1: 30, 2: 9, 3: 5}[axes]
    sizes = tuple(tuple(source.randint(1, most) for _ in range(axes)) for _ in range(levels))
    options: dict[str, Any] = {
        "batch": source.randint(1, 3),
        "queries": source.randint(1, 20),
        "heads": source.randint(1, 4),
        "channels": source.choice((1, 2, 3, 5, 8, 16, 32)),
        "points": tuple(source.randint(1, 5) for _ in range(levels)),
    }
    return Case("drawn", sizes=sizes, **{**options, **fixed})


def uniform(seed: int) -> Case:
    """A configuration for images with the same number of points on each level."""
    case = draw(seed, 2)
    return draw(seed, 2, points=(seed % 4 + 1,) * len(case.sizes))


def compare(ours: Any, theirs: Any, case: Case, seed: int, positions: tuple[int, ...] = (0, 1, 2)) -> None:
    named = case.arguments(torch.float64, seed=seed)
    given = [named[name] for name in TENSORS]
    results = [evaluate(function, given, positions, torch.float64) for function in (ours, theirs)]
    for name, one, other in zip(("output", *(TENSORS[i] for i in positions)), *results, strict=True):
        assert other.any()
        assert_close(one, other, name=name)


def flattened(case: Case) -> Any:
    return lambda *tensors: dk.ms_deform_attn(
        tensors[0], case.sizes, *tensors[1:], num_points=case.points, mode=case.mode
    )


def by_grid_sample(case: Case) -> Any:
    """The sum over levels of F.grid_sample, whose grid is x first, too; a sequence becomes an image of one row."""

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        result, start, first = torch.zeros(()), 0, 0
        for size, count in zip(case.sizes, case.points, strict=True):
            length = torch.Size(size).numel()
            points = locations[:, :, :, first : first + count]
            size = size if case.axes > 1 else (1, *size)
            if case.axes == 1:
                points = torch.cat([points, torch.full_like(points, 0.5)], -1)
            fields = value[:, start : start + length].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, size)
            grid = (2 * points - 1).transpose(1, 2).flatten(0, 1)
            grid = grid if len(size) == 2 else grid.unsqueeze(1)
            samples = F.grid_sample(fields, grid, align_corners=False)
            samples = samples.flatten(2).unflatten(0, (case.batch, case.heads)).unflatten(-1, (case.queries, count))
            result = result + torch.einsum("bhdqp,bqhp->bqhd", samples, weights[..., first : first + count])
            start, first = start + length, first + count
        return result.flatten(2)

    return function


@pytest.mark.parametrize("seed", range(25))
def test_grid_sample(axes: int, seed: int) -> None:
    case = draw(seed, axes)
    compare(flattened(case), by_grid_sample(case), case, seed)


@pytest.mark.parametrize("seed", range(25))
def test_deformable_detr(seed: int) -> None:
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    case = uniform(seed)
    form = (len(case.sizes), case.points[0])
    shapes = torch.tensor(case.sizes)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)[:-1]])
    core = module.MultiScaleDeformableAttention()

    def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        levels = locations.unflatten(3, form), weights.unflatten(3, form)
        return core(value, shapes, list(case.sizes), starts, *levels, 64)

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return dk.ms_deform_attn(value, shapes, locations.unflatten(3, form), weights.unflatten(3, form))

    compare(ours, theirs, case, seed)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("mode", "method"), [("linear", "default"), ("nearest", "discrete")])
def test_rt_detr_v2(seed: int, mode: str, method: str) -> None:
    module = pytest.importorskip("transformers.models.rt_detr_v2.modeling_rt_detr_v2")
    case = draw(seed, 2, mode=mode)

    def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        counts = list(case.points)
        return module.multi_scale_deformable_attention_v2(value, case.sizes, locations, weights, counts, method)

    # The other implementation has no derivative of the nearest pixel by the location; that of deformkit is zero.
    compare(flattened(case), theirs, case, seed, (0, 1, 2) if mode == "linear" else (0, 2))


@pytest.mark.parametrize("seed", range(5))
def test_nearest_is_flat_in_the_location(axes: int, seed: int) -> None:
    case = draw(seed, axes, mode="nearest")
    named = case.arguments(torch.float64, seed=seed)
    _, gradient = evaluate(flattened(case), [named[name] for name in TENSORS], [1], torch.float64)
    assert_equal(gradient, torch.zeros_like(gradient))
