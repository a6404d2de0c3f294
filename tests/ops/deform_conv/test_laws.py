"""Laws of deformable convolution, on random geometries from hypothesis."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._shape import prod
from deformkit.ops.deform_conv.cases import Case

FUNCTIONS = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}
laws = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def geometries(draw: st.DrawFn, axes: int | None = None, boundary: str | None = None) -> Case:
    axes = draw(st.integers(1, 3)) if axes is None else axes

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 3), each(1, 3)
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + extra
        for k, p, d, extra in zip(kernel, padding, dilation, each(0, 4 if axes < 3 else 2), strict=True)
    )
    groups, offset_groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 4), (4, 4)]))
    channels = torch.lcm(torch.tensor(groups), torch.tensor(offset_groups)).item() * draw(st.integers(1, 3))
    return Case(
        "drawn",
        draw(st.integers(1, 3)),
        channels,
        size,
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        modulated=draw(st.booleans()),
        bias=draw(st.booleans()),
        boundary=draw(st.sampled_from(["zeros", "border"])) if boundary is None else boundary,
        offset_std=draw(st.sampled_from([0.5, 2.0, 10.0])),
    )


def run(named: dict[str, Any]) -> dict[str, Tensor]:
    """The output and every gradient in float64, by name. The cotangent is the cosine of the output, to move with it."""
    names = [name for name, value in named.items() if isinstance(value, Tensor)]
    values = {name: named[name].detach().requires_grad_() for name in names}
    output = FUNCTIONS[named["input"].dim() - 2](**{**named, **values})
    grads = torch.autograd.grad(output, list(values.values()), output.detach().cos())
    return dict(zip(["output", *names], [output.detach(), *grads], strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name=name)


@laws
@given(geometries(boundary="zeros"), seeds)
def test_zero_offset_is_the_plain_convolution(case: Case, seed: int) -> None:
    named = case.arguments(torch.float64, seed=seed)
    named.update(offset=torch.zeros_like(named["offset"]), mask=None)
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[case.axes]
    steps = (named["stride"], named["padding"], named["dilation"], case.groups)
    expected = plain(named["input"], named["weight"], named["bias"], *steps)
    assert_close(run(named)["output"], expected)


@laws
@given(geometries(), seeds, st.data())
def test_an_integer_offset_is_a_shift(case: Case, seed: int, data: st.DataObject) -> None:
    """Moving every point by whole pixels equals a change of the padding."""
    named = case.arguments(torch.float64, seed=seed)
    shift = [data.draw(st.integers(0, 4)) for _ in case.size]
    moved = named["offset"].unflatten(1, (-1, case.axes))
    moved = moved - torch.tensor(shift, dtype=torch.float64).reshape(-1, *[1] * case.axes)
    named["offset"], plain = moved.flatten(1, 2), dict(named)
    # A first tap farther outside has the same points, on an output that is cropped to the same size.
    padding = [p + s for p, s in zip(named["padding"], shift, strict=True)]
    grown = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(case.size, padding, named["dilation"], case.kernel_size, named["stride"], strict=True)
    ]
    out_size = plain["offset"].shape[2:]
    for name in ("offset", "mask"):
        if plain[name] is not None:
            extra = [n for g, o in zip(reversed(grown), reversed(out_size), strict=True) for n in (0, g - o)]
            plain[name] = F.pad(case.arguments(torch.float64, seed=seed)[name], extra)
    whole = FUNCTIONS[case.axes](**{**plain, "padding": padding})
    cut = whole[(slice(None), slice(None), *(slice(n) for n in out_size))]
    assert_close(run(named)["output"], cut)


@laws
@given(geometries(axes=1) | geometries(axes=2), seeds, st.data())
def test_a_unit_axis_changes_nothing(case: Case, seed: int, data: st.DataObject) -> None:
    """A k-D call equals the (k+1)-D call with an additional axis of size 1 at any place."""
    named = case.arguments(torch.float64, seed=seed)
    place = data.draw(st.integers(0, case.axes))
    lifted = dict(named)
    for name in ("input", "weight", "mask"):
        if named[name] is not None:
            lifted[name] = named[name].unsqueeze(2 + place)
    parts = list(named["offset"].unflatten(1, (-1, case.axes)).unbind(2))
    parts.insert(place, torch.zeros_like(parts[0]))
    lifted["offset"] = torch.stack(parts, 2).flatten(1, 2).unsqueeze(2 + place)
    for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
        lifted[name] = [*named[name][:place], neutral, *named[name][place:]]
    results = run(lifted)
    for name in ("output", "input", "weight", "mask"):
        if name in results:
            results[name] = results[name].squeeze(2 + place)
    by_tap = list(results["offset"].squeeze(2 + place).unflatten(1, (-1, case.axes + 1)).unbind(2))
    del by_tap[place]
    results["offset"] = torch.stack(by_tap, 2).flatten(1, 2)
    assert_same(results, run(named))


@laws
@given(geometries(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_splitting_the_batch_keeps_the_bits(case: Case, seed: int, dtype: torch.dtype) -> None:
    named = case.arguments(dtype, seed=seed)
    whole = run(named)
    batched = [name for name in ("input", "offset", "mask") if named[name] is not None]
    for n in range(case.batch):
        part = run({**named, **{name: named[name][n : n + 1] for name in batched}})
        for name in ("output", *batched):
            assert_equal(part[name], whole[name][n : n + 1], name=f"{name} of batch element {n}")


@laws
@given(geometries(), seeds)
def test_adjoint_in_input_and_in_weight(case: Case, seed: int) -> None:
    """The operator is linear in input and in weight, and each gradient is the adjoint: <A x, y> = <x, A' y>."""
    named = case.arguments(torch.float64, seed=seed)
    named["bias"] = None
    other = case.arguments(torch.float64, seed=seed + 1)
    function = FUNCTIONS[case.axes]
    for name in ("input", "weight"):
        x = other[name]
        start = {**named, name: named[name].detach().requires_grad_()}
        output = function(**start)
        y = torch.randn_like(output)
        (adjoint,) = torch.autograd.grad(output, start[name], y)
        forward = function(**{**named, name: x}) * y
        backward = x * adjoint
        magnitude = forward.abs().sum() + backward.abs().sum()
        # Relative to the sum of the magnitudes, on which rounding depends: the terms may cancel.
        assert_close(forward.sum() - backward.sum() + magnitude, magnitude, name=name)


@laws
@given(geometries(), seeds, st.data())
def test_groups_permute(case: Case, seed: int, data: st.DataObject) -> None:
    """Permuting the groups of the input with their offsets and weights permutes the output."""
    count = case.groups
    if case.offset_groups % count:
        case = Case(**{**case.__dict__, "offset_groups": count})
    named = case.arguments(torch.float64, seed=seed)
    order = data.draw(st.permutations(range(count)))

    def permute(value: Tensor, axis: int) -> Tensor:
        parts = value.unflatten(axis, (count, -1))
        return parts.index_select(axis, torch.tensor(order)).flatten(axis, axis + 1)

    axis = {"input": 1, "offset": 1, "mask": 1, "weight": 0, "bias": 0, "output": 1}
    permuted = {k: permute(v, axis[k]) if isinstance(v, Tensor) else v for k, v in named.items()}
    expected = {k: permute(v, axis[k]) for k, v in run(named).items()}
    assert_same(run(permuted), expected)


@laws
@given(geometries(boundary="zeros"), seeds, st.data())
def test_zeros_around_the_input_are_its_boundary(case: Case, seed: int, data: st.DataObject) -> None:
    """Translation: zeros around the input, and a window that starts earlier by as much, give the same samples."""
    named = case.arguments(torch.float64, seed=seed)
    low = [data.draw(st.integers(0, p)) for p in named["padding"]]
    padded = F.pad(named["input"], [n for p in reversed(low) for n in (p, p)])
    moved = {**named, "input": padded, "padding": [p - n for p, n in zip(named["padding"], low, strict=True)]}
    results = run(moved)
    inner = (slice(n, n + s) for n, s in zip(low, case.size, strict=True))
    results["input"] = results["input"][(slice(None), slice(None), *inner)]
    assert_same(results, run(named))


@laws
@given(geometries(), seeds)
def test_a_mask_of_ones_is_no_mask(case: Case, seed: int) -> None:
    named = case.arguments(torch.float64, seed=seed)
    shape = (case.batch, case.offset_groups * prod(case.kernel_size), *named["offset"].shape[2:])
    masked = run({**named, "mask": torch.ones(shape, dtype=torch.float64)})
    del masked["mask"]
    assert_same(masked, run({**named, "mask": None}))


@laws
@given(geometries(), seeds)
def test_groups_are_separate_calls(case: Case, seed: int) -> None:
    """A grouped call is the concatenation of its groups, each with its own share of the offset groups."""
    if case.offset_groups % case.groups:
        case = Case(**{**case.__dict__, "offset_groups": case.groups})
    named = case.arguments(torch.float64, seed=seed)
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    parts = [
        run(
            {**named, **{k: v.chunk(case.groups, 0 if k in ("weight", "bias") else 1)[g] for k, v in tensors.items()}},
        )
        for g in range(case.groups)
    ]
    joined = {k: torch.cat([part[k] for part in parts], 0 if k in ("weight", "bias") else 1) for k in parts[0]}
    assert_same(joined, run(named))


@laws
@given(geometries(), seeds, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_kernel_is_the_reference(case: Case, seed: int, dtype: torch.dtype) -> None:
    from deformkit.ops._operator import operators

    operator = operators["deform_conv"]
    args = operator.ordered(case.arguments(dtype, seed=seed))
    doubles = [v.double() if isinstance(v, Tensor) else v for v in args]
    positions = [i for i in operator.differentiable if args[i] is not None]
    actual = evaluate(operator, args, positions, dtype)
    truth = evaluate(operator.reference, doubles, positions, dtype)
    reference = evaluate(operator.reference, args, positions, dtype)
    for i, results in enumerate(zip(actual, truth, reference, strict=True)):
        assert_close(*results, name=f"result {i}")
