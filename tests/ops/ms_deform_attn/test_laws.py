"""Laws of multi-scale deformable attention, on random geometries from hypothesis."""

from math import prod
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from rooms import needs_kernel
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._shape import code_of
from deformkit.ops.ms_deform_attn.cases import Case

TENSORS = ("value", "sampling_locations", "attention_weights")
laws = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)
modes = st.sampled_from(["linear", "nearest"])


@st.composite
def geometries(draw: st.DrawFn, axes: int | None = None, mode: str | None = None) -> Case:
    axes = draw(st.integers(1, 3)) if axes is None else axes
    size = st.tuples(*[st.integers(1, {1: 20, 2: 6, 3: 4}[axes])] * axes)
    sizes = tuple(draw(st.lists(size, min_size=1, max_size=3)))
    points = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)).filter(any))
    return Case(
        "drawn",
        draw(st.integers(1, 3)),
        sizes,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 5, 8, 17])),
        tuple(points),
        mode=draw(modes) if mode is None else mode,
        reach=draw(st.sampled_from([0.0, 1.5, 10.0])),
    )


def run(case: Case, named: dict[str, Any]) -> dict[str, Tensor]:
    """The output and every gradient, by name, for one random cotangent."""

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return dk.ms_deform_attn(value, case.sizes, locations, weights, num_points=case.points, mode=case.mode)

    given = [named[name] for name in TENSORS]
    return dict(zip(("output", *TENSORS), evaluate(function, given, range(3), given[0].dtype), strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        assert_close(value, expected[name], name=name)


def with_(case: Case, **changes: Any) -> Case:
    return Case(**{**case.__dict__, **changes})


@laws
@given(geometries(axes=1) | geometries(axes=2), seeds, st.data())
def test_a_unit_axis_changes_nothing(case: Case, seed: int, data: st.DataObject) -> None:
    """A k-D call equals the (k+1)-D call with an additional axis of size 1 at any place, and the location 1/2 on it."""
    named = case.arguments(torch.float64, seed=seed)
    place = data.draw(st.integers(0, case.axes))
    lifted = with_(case, sizes=tuple((*size[:place], 1, *size[place:]) for size in case.sizes))
    parts = list(named["sampling_locations"].unbind(-1))
    parts.insert(case.axes - place, torch.full_like(parts[0], 0.5))
    results = run(lifted, {**named, "sampling_locations": torch.stack(parts, -1)})
    kept = [axis for axis in range(case.axes + 1) if axis != case.axes - place]
    results["sampling_locations"] = results["sampling_locations"][..., kept]
    assert_same(results, run(case, named))


@needs_kernel("ms_deform_attn")
@laws
@given(geometries(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_splitting_the_batch_keeps_the_bits(case: Case, seed: int, dtype: torch.dtype) -> None:
    named = case.arguments(dtype, seed=seed)
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels).to(dtype)

    def both(part: slice) -> list[Tensor]:
        given = [named[name][part] for name in TENSORS]
        output = dk.ms_deform_attn(given[0], case.sizes, *given[1:], num_points=case.points, mode=case.mode)
        backward = torch.ops.deformkit.ms_deform_attn_backward
        sizes = [n for size in case.sizes for n in size]
        rest = (given[0], sizes, *given[1:], list(case.points), code_of("mode", case.mode))
        return [output, *backward(cotangent[part], *rest, [True] * 3)]

    whole = both(slice(None))
    for n in range(case.batch):
        for name, one, all_of_them in zip(("output", *TENSORS), both(slice(n, n + 1)), whole, strict=True):
            assert_equal(one, all_of_them[n : n + 1], name=f"{name} of batch element {n}")


@laws
@given(geometries(), seeds)
def test_adjoint_in_value_and_in_attention_weights(case: Case, seed: int) -> None:
    """The operator is linear in value and attention weights, and each gradient is the adjoint: <A x, y> = <x, A' y>."""
    named = case.arguments(torch.float64, seed=seed)
    other = case.arguments(torch.float64, seed=seed + 1)
    cotangent = torch.randn(case.batch, case.queries, case.heads * case.channels, dtype=torch.float64)
    args = [other["value"], named["spatial_shapes"], *(named[name] for name in TENSORS[1:])]
    rest = [named["num_points"], code_of("mode", named["mode"])]
    adjoints = torch.ops.deformkit.ms_deform_attn_backward(
        cotangent, named["value"], *args[1:], *rest, [True, False, True]
    )
    for name in ("value", "attention_weights"):
        forward = run(case, {**named, name: other[name]})["output"] * cotangent
        backward = other[name] * adjoints[TENSORS.index(name)]
        magnitude = forward.abs().sum() + backward.abs().sum()
        # Relative to the sum of the magnitudes, on which rounding depends: the terms may cancel.
        assert_close(forward.sum() - backward.sum() + magnitude, magnitude, name=name)


@laws
@given(geometries(), seeds)
def test_linear_in_value_and_in_attention_weights(case: Case, seed: int) -> None:
    named = case.arguments(torch.float64, seed=seed)
    for name in ("value", "attention_weights"):
        other = torch.randn_like(named[name])
        one, two = (run(case, {**named, name: v})["output"] for v in (named[name], other))
        sum_of_both = run(case, {**named, name: 2 * named[name] - 3 * other})["output"]
        assert_close(sum_of_both, 2 * one - 3 * two, name=name)


@laws
@given(geometries(), seeds, st.data())
def test_points_add_up(case: Case, seed: int, data: st.DataObject) -> None:
    """A call equals the sum of two calls that divide its points between them on each level."""
    case = with_(case, points=tuple(p + 1 for p in case.points))
    named = case.arguments(torch.float64, seed=seed)
    first = [data.draw(st.integers(0, p)) for p in case.points]
    if sum(first) in (0, sum(case.points)):
        first = [0] * (len(first) - 1) + [1]
        case = with_(case, points=(*case.points[:-1], case.points[-1] + 1))
        named = case.arguments(torch.float64, seed=seed)
    in_first = torch.cat([torch.arange(p) < n for p, n in zip(case.points, first, strict=True)])
    whole, parts = run(case, named), []
    for chosen, counts in (
        (in_first, first),
        (~in_first, [p - n for p, n in zip(case.points, first, strict=True)]),
    ):
        part = {**named, **{name: named[name][:, :, :, chosen] for name in TENSORS[1:]}}
        parts.append(run(with_(case, points=tuple(counts)), part))
        for name in TENSORS[1:]:
            assert_close(parts[-1][name], whole[name][:, :, :, chosen], name=name)
    for name in ("output", "value"):
        assert_close(parts[0][name] + parts[1][name], whole[name], name=name)


@laws
@given(geometries(), seeds, st.data())
def test_levels_permute(case: Case, seed: int, data: st.DataObject) -> None:
    """The order of the levels has no effect if their values and points are reordered with them."""
    order = data.draw(st.permutations(range(len(case.sizes))))
    lengths = [prod(size) for size in case.sizes]

    def permute(value: Tensor, counts: list[int], axis: int) -> Tensor:
        parts = value.split(counts, axis)
        return torch.cat([parts[i] for i in order], axis)

    def permuted(named: dict[str, Any]) -> dict[str, Any]:
        moved = {name: permute(named[name], list(case.points), 3) for name in TENSORS[1:]}
        return {**named, **moved, "value": permute(named["value"], lengths, 1)}

    named = case.arguments(torch.float64, seed=seed)
    other = with_(case, sizes=tuple(case.sizes[i] for i in order), points=tuple(case.points[i] for i in order))
    assert_same(run(other, permuted(named)), permuted(run(case, named)))


@laws
@given(geometries(), seeds, st.data())
def test_heads_and_queries_are_separate(case: Case, seed: int, data: st.DataObject) -> None:
    """The output of one head at one query equals that of a call with nothing else."""
    named = case.arguments(torch.float64, seed=seed)
    query, head = data.draw(st.integers(0, case.queries - 1)), data.draw(st.integers(0, case.heads - 1))
    alone = {name: named[name][:, query : query + 1, head : head + 1] for name in TENSORS[1:]}
    alone["value"] = named["value"][:, :, head : head + 1]
    output = run(case, named)["output"].unflatten(-1, (case.heads, case.channels))
    assert_close(run(with_(case, queries=1, heads=1), alone)["output"], output[:, query : query + 1, head])


@laws
@given(geometries(), seeds)
def test_one_point_on_a_pixel_reads_that_pixel(case: Case, seed: int) -> None:
    """The weight is one. In nearest mode the point is the lower edge of the pixel, half a pixel farther."""
    case = with_(case, sizes=case.sizes[:1], points=(1,), queries=prod(case.sizes[0]))
    named = case.arguments(torch.float64, seed=seed)
    pixels = torch.stack(torch.meshgrid(*map(torch.arange, case.sizes[0]), indexing="ij"), -1).flatten(0, -2)
    shift = 0.5 if case.mode == "linear" else 0.0
    locations = ((pixels + shift) / torch.tensor(case.sizes[0], dtype=torch.float64)).flip(-1)
    named["sampling_locations"] = locations[None, :, None, None].expand_as(named["sampling_locations"])
    named["attention_weights"] = torch.ones_like(named["attention_weights"])
    assert_close(run(case, named)["output"], named["value"].flatten(2))
