"""The deformable correlation against its formula in torch's sampler, and what is said about wrong arguments."""

from typing import Any

import pytest
import torch
from rooms import Call, check
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators
from deformkit.ops.deform_correlate.cases import CASES, Case

LINEAR = [case for case in CASES if case.mode == "linear"]


def by_grid_sample(case: Case, query: Tensor, key: Tensor, locations: Tensor) -> Tensor:
    """Sampled, then multiplied; a sequence is an image one row high."""
    products, start, first = [], 0, 0
    for size, count in zip(case.sizes, case.points, strict=True):
        length = torch.Size(size).numel()
        field = key[:, start : start + length].permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)
        grid = 2 * locations[:, :, :, first : first + count].transpose(1, 2).flatten(0, 1) - 1
        if case.axes == 1:
            field, grid = field.unsqueeze(2), torch.cat([grid, torch.zeros_like(grid)], -1)
        if case.axes == 3:
            grid = grid.unsqueeze(1)
        samples = F.grid_sample(field, grid, align_corners=False).reshape(*field.shape[:2], case.queries, count)
        vectors = query.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(-1)
        products.append((samples * vectors).sum(1).unflatten(0, (case.batch, case.heads)).transpose(1, 2))
        start, first = start + length, first + count
    return torch.cat(products, -1)


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_formula(case: Case) -> None:
    named = case.arguments(torch.float64)
    shapes = [list(size) for size in case.sizes]
    query = named["query"].unflatten(2, (case.heads, case.channels))
    values = [query, named["key"], named["sampling_locations"]]

    def ours(query: Tensor, key: Tensor, locations: Tensor) -> Tensor:
        return dk.deform_correlate(query, key, shapes, locations, num_points=case.points)

    actual = evaluate(ours, values, [0, 1, 2], torch.float64)
    expected = evaluate(lambda *v: by_grid_sample(case, *v), values, [0, 1, 2], torch.float64)
    for name, one, other in zip(("output", "query", "key", "locations"), actual, expected, strict=True):
        assert_close(one, other, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [3, 90], ids=["in-place", "laid-out"])
@pytest.mark.parametrize("channels", [1, 4, 5, 8, 12, 16, 31, 32, 64, 72])
def test_any_number_of_channels(channels: int, queries: int, dtype: torch.dtype) -> None:
    """Registers hold some, and some points fill no register; one location is NaN, and one lies outside."""
    call = Call(operators["deform_correlate"], Case("any", 1, ((5, 6), (3, 2)), queries, 2, channels, (2, 3)))
    args = call.arguments(dtype)
    locations = args[call.operator.arguments.index("sampling_locations")]
    locations[0, 1, 0, 3, 0], locations[0, 2, 1, 1] = torch.nan, -1.0
    output = call.operator(*args)
    assert output[0, 1, 0].isnan().sum() == 1 and output[0, 2, 1, 1] == 0
    check(call, args)


def test_levels_of_as_many_points_have_an_axis_of_their_own() -> None:
    shapes = [(4, 5), (2, 3)]
    query, key = torch.randn(2, 7, 2, 3), torch.randn(2, 26, 2, 3)
    locations = torch.rand(2, 7, 2, 2, 3, 2)
    result = dk.deform_correlate(query, key, shapes, locations)
    assert result.shape == (2, 7, 2, 2, 3)
    flat = dk.deform_correlate(query, key, torch.tensor(shapes), locations.flatten(3, 4), num_points=3)
    assert_equal(result.flatten(3), flat)


def test_softmax_and_attention_make_guided_attention() -> None:
    """Correlation gives the weights with which attention reads the same points."""
    shapes, points = [(6, 5)], torch.rand(1, 4, 2, 1, 3, 2, dtype=torch.float64)
    query, key, value = (torch.randn(1, n, 2, 8, dtype=torch.float64) for n in (4, 30, 30))
    weights = dk.deform_correlate(query, key, shapes, points).softmax(-1)
    result = dk.ms_deform_attn(value, shapes, points, weights)
    keys, values = (
        dk.ms_deform_attn(
            field, shapes, points.movedim(4, 1).flatten(1, 2).unsqueeze(4), torch.ones(1, 12, 2, 1, 1).double()
        )
        .unflatten(1, (3, 4))
        .unflatten(3, (2, 8))
        for field in (key, value)
    )
    share = (keys * query.unsqueeze(1)).sum(-1, keepdim=True).softmax(1)
    assert_close(result, (share * values).sum(1).flatten(2))


def sound() -> dict[str, Any]:
    return {
        "query": torch.randn(2, 7, 2, 3),
        "key": torch.randn(2, 26, 2, 3),
        "spatial_shapes": [(4, 5), (2, 3)],
        "sampling_locations": torch.rand(2, 7, 2, 2, 3, 2),
    }


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"query": None}, TypeError, "query is a NoneType; it must be a torch.Tensor"),
    "query axes": (
        {"query": torch.zeros(2, 7, 6)},
        ValueError,
        r"query has shape \[2, 7, 6\]; it must be \[B, Q, H, D\]",
    ),
    "heads": ({"query": torch.zeros(2, 7, 3, 2)}, ValueError, "it must have 2 heads of 3 channels"),
    "queries": ({"query": torch.zeros(2, 6, 2, 3)}, ValueError, "query has 6 queries; sampling_locations has 7"),
    "batch": ({"query": torch.zeros(1, 7, 2, 3)}, ValueError, "query has batch size 1; key has 2"),
    "key dtype": ({"key": torch.zeros(2, 26, 2, 3).half()}, TypeError, "key has dtype torch.float16"),
    "key length": ({"key": torch.zeros(2, 25, 2, 3)}, ValueError, "spatial_shapes adds up to 26 = .*; key has 25"),
    "half locations": (
        {"sampling_locations": torch.zeros(2, 7, 2, 2, 3, 2).half()},
        TypeError,
        "sampling_locations has dtype torch.float16; it must be torch.float32: in half precision",
    ),
    "coordinates": ({"sampling_locations": torch.zeros(2, 7, 2, 2, 3, 4)}, ValueError, "1, 2 or 3 coordinates N"),
    "levels": ({"spatial_shapes": [(13, 2)]}, ValueError, "sampling_locations has 2 levels; spatial_shapes has 1"),
    "mode": ({"mode": "cubic"}, ValueError, "mode is 'cubic'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        dk.deform_correlate(**{**sound(), **change})
