"""Laws of deformable aggregation, on random geometries from hypothesis."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators
from deformkit.ops.deform_aggregate.cases import Case

laws = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)
NAMES = ("value", "offset", "weight")


@st.composite
def geometries(draw: st.DrawFn, axes: int | None = None, **options: Any) -> Case:
    axes = draw(st.integers(1, 3)) if axes is None else axes

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 3), each(1, 3)
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + extra
        for k, p, d, extra in zip(kernel, padding, dilation, each(0, 4 if axes < 3 else 2), strict=True)
    )
    drawn = {
        "offset_scale": draw(st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.7])),
        "remove_center": all(k % 2 for k in kernel) and max(kernel) > 1 and draw(st.booleans()),
        "boundary": draw(st.sampled_from(["zeros", "border"])),
        "offset_std": draw(st.sampled_from([0.5, 2.0, 10.0])),
    }
    heads, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    options = {**drawn, **options}
    return Case("drawn", draw(st.integers(1, 3)), size, heads, channels, kernel, stride, padding, dilation, **options)


def run(named: dict[str, Any]) -> dict[str, Tensor]:
    """The output and every gradient, by name. The cotangent is the cosine of the output, to move with it."""
    values = {name: named[name].detach().requires_grad_() for name in NAMES}
    output = dk.deform_aggregate(**{**named, **values})
    grads = torch.autograd.grad(output, list(values.values()), output.detach().cos())
    return dict(zip(["output", *NAMES], [output.detach(), *grads], strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name=name)


def windows(field: Tensor, named: dict[str, Any]) -> Tensor:
    """The samples of an undeformed window in ``field [B, *S, H, D]``, as ``[B, *out, H, D, K]``."""
    axes = field.dim() - 3
    read = F.pad(field.movedim((-2, -1), (1, 2)), [n for p in reversed(named["padding"]) for n in (p, p)])
    for axis in range(axes):
        k, d, s = (named[name][axis] for name in ("kernel_size", "dilation", "stride"))
        read = read.unfold(3 + axis, d * (k - 1) + 1, s)[..., ::d]
    return read.flatten(3 + axes).movedim((1, 2), (-3, -2))


@laws
@given(geometries(boundary="zeros", offset_scale=1.0), seeds)
def test_zero_offset_is_the_weighted_sum_of_the_window(case: Case, seed: int) -> None:
    named = case.arguments(torch.float64, seed=seed)
    named["offset"] = torch.zeros_like(named["offset"])
    read = windows(named["value"], named)
    if case.remove_center:
        middle = read.shape[-1] // 2
        read = torch.cat([read[..., :middle], read[..., middle + 1 :]], -1)
    assert_close(dk.deform_aggregate(**named), (read * named["weight"].unsqueeze(-2)).sum(-1))


@laws
@given(geometries(), seeds)
def test_a_removed_centre_is_a_weight_of_zero(case: Case, seed: int) -> None:
    whole = Case(**{**case.__dict__, "kernel_size": (3,) * case.axes, "remove_center": False, "padding": 3})
    named = whole.arguments(torch.float64, seed=seed)
    middle = 3**case.axes // 2
    kept = [tap for tap in range(3**case.axes) if tap != middle]
    named["weight"][..., middle] = 0
    less = {"offset": named["offset"][..., kept, :], "weight": named["weight"][..., kept], "remove_center": True}
    expected = run(named)
    expected.update(offset=expected["offset"][..., kept, :], weight=expected["weight"][..., kept])
    assert_same(run({**named, **less}), expected)


@laws
@given(geometries(), seeds)
def test_the_scale_spreads_the_taps(case: Case, seed: int) -> None:
    """A scale equals offsets that move each tap by as much: with scale 1 they reach the same points."""
    named = case.arguments(torch.float64, seed=seed)
    from_centre = case._from_centre(named["dilation"])
    offset = case.offset_scale * (from_centre + named["offset"]) - from_centre
    plain = run({**named, "offset": offset, "offset_scale": 1.0})
    plain["offset"] = plain["offset"] * case.offset_scale
    assert_same(run(named), plain)


@laws
@given(geometries(), seeds, st.data())
def test_an_integer_offset_is_a_shift(case: Case, seed: int, data: st.DataObject) -> None:
    """Moving every point by whole pixels equals a change of the padding."""
    named = case.arguments(torch.float64, seed=seed)
    shift = [data.draw(st.integers(0, 4)) for _ in case.size]
    moved = {**named, "offset": named["offset"] - torch.tensor(shift, dtype=torch.float64) / case.offset_scale}
    # A first tap farther outside has the same points, on an output that is cropped to the same size.
    padding = [p + s for p, s in zip(named["padding"], shift, strict=True)]
    grown = Case(**{**case.__dict__, "padding": tuple(padding)}).arguments(torch.float64, seed=seed)
    inner = (slice(None), *(slice(n) for n in named["offset"].shape[1:-3]))
    for name in ("offset", "weight"):
        grown[name][inner] = named[name]
    grown["value"] = named["value"]
    assert_close(dk.deform_aggregate(**moved), dk.deform_aggregate(**grown)[inner])


@laws
@given(geometries(axes=1) | geometries(axes=2), seeds, st.data())
def test_a_unit_axis_changes_nothing(case: Case, seed: int, data: st.DataObject) -> None:
    """A k-D call equals the (k+1)-D call with an additional axis of size 1 at any place."""
    named = case.arguments(torch.float64, seed=seed)
    place = data.draw(st.integers(0, case.axes))
    lifted = {**named, **{name: named[name].unsqueeze(1 + place) for name in NAMES}}
    parts = list(lifted["offset"].unbind(-1))
    parts.insert(place, torch.zeros_like(parts[0]))
    lifted["offset"] = torch.stack(parts, -1)
    for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        lifted[name] = [*named[name][:place], neutral, *named[name][place:]]
    results = {name: value.squeeze(1 + place) for name, value in run(lifted).items()}
    coordinates = [axis for axis in range(case.axes + 1) if axis != place]
    results["offset"] = results["offset"][..., coordinates]
    assert_same(results, run(named))


@laws
@given(geometries(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_splitting_the_batch_keeps_the_bits(case: Case, seed: int, dtype: torch.dtype) -> None:
    named = case.arguments(dtype, seed=seed)
    whole = run(named)
    for n in range(case.batch):
        part = run({**named, **{name: named[name][n : n + 1] for name in NAMES}})
        for name, value in part.items():
            assert_equal(value, whole[name][n : n + 1], name=f"{name} of batch element {n}")


@laws
@given(geometries(), seeds)
def test_adjoint_in_value_and_in_weight(case: Case, seed: int) -> None:
    """The operator is linear in value and in weight, and each gradient is the adjoint: <A x, y> = <x, A' y>."""
    named = case.arguments(torch.float64, seed=seed)
    other = case.arguments(torch.float64, seed=seed + 1)
    for name in ("value", "weight"):
        x = other[name]
        start = {**named, name: named[name].detach().requires_grad_()}
        output = dk.deform_aggregate(**start)
        y = torch.randn_like(output)
        (adjoint,) = torch.autograd.grad(output, start[name], y)
        forward = dk.deform_aggregate(**{**named, name: x}) * y
        backward = x * adjoint
        magnitude = forward.abs().sum() + backward.abs().sum()
        # Relative to the sum of the magnitudes, on which rounding depends: the terms may cancel.
        assert_close(forward.sum() - backward.sum() + magnitude, magnitude, name=name)


@laws
@given(geometries(), seeds, st.data())
def test_heads_and_channels_permute(case: Case, seed: int, data: st.DataObject) -> None:
    named = case.arguments(torch.float64, seed=seed)
    heads = torch.tensor(data.draw(st.permutations(range(case.heads))))
    channels = torch.tensor(data.draw(st.permutations(range(case.channels))))
    axis = {"value": -2, "offset": -3, "weight": -2, "output": -2}

    def permute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {name: tensors[name].index_select(axis[name], heads) for name in tensors}
        return {k: v.index_select(-1, channels) if k in ("value", "output") else v for k, v in moved.items()}

    permuted = permute({name: named[name] for name in NAMES})
    assert_same(run({**named, **permuted}), permute(run(named)))


@laws
@given(geometries(), seeds, st.data())
def test_taps_permute(case: Case, seed: int, data: st.DataObject) -> None:
    """Taps differ only in their place in the window: another tap reaches the same point with another offset."""
    named = case.arguments(torch.float64, seed=seed)
    from_centre = case._from_centre(named["dilation"])
    order = data.draw(st.permutations(range(len(from_centre))))
    offset = (from_centre + named["offset"])[..., order, :] - from_centre
    expected = run(named)
    expected.update(offset=expected["offset"][..., order, :], weight=expected["weight"][..., order])
    assert_same(run({**named, "offset": offset, "weight": named["weight"][..., order]}), expected)


@laws
@given(geometries(remove_center=False), seeds)
def test_constant_weights_are_a_depthwise_convolution(case: Case, seed: int) -> None:
    """With weights that depend only on tap and head, aggregation is deform_conv with one offset group for each head."""
    named = case.arguments(torch.float64, seed=seed)
    first = named["weight"][(0,) * (case.axes + 1)].clone()
    named["weight"] = first.expand_as(named["weight"])
    from_centre = case._from_centre(named["dilation"])
    offset = case.offset_scale * (from_centre + named["offset"]) - from_centre
    to_channels = (1 + case.axes, 2 + case.axes), (1, 2)
    function = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}[case.axes]
    expected = function(
        named["value"].movedim(*to_channels).flatten(1, 2),
        offset.movedim((-3, -2, -1), (1, 2, 3)).flatten(1, 3),
        first.repeat_interleave(case.channels, 0).reshape(-1, 1, *case.kernel_size),
        stride=named["stride"],
        padding=named["padding"],
        dilation=named["dilation"],
        boundary=case.boundary,
    )
    expected = expected.unflatten(1, (case.heads, case.channels)).movedim(*reversed(to_channels))
    assert_close(dk.deform_aggregate(**named), expected)


@laws
@given(geometries(boundary="zeros"), seeds, st.data())
def test_zeros_around_the_value_are_its_boundary(case: Case, seed: int, data: st.DataObject) -> None:
    """Translation: zeros around the value, and a window that starts earlier by as much, give the same samples."""
    named = case.arguments(torch.float64, seed=seed)
    low = [data.draw(st.integers(0, p)) for p in named["padding"]]
    padded = F.pad(named["value"], [0, 0, 0, 0, *(n for p in reversed(low) for n in (p, p))])
    moved = {**named, "value": padded, "padding": [p - n for p, n in zip(named["padding"], low, strict=True)]}
    results = run(moved)
    inner = (slice(n, n + s) for n, s in zip(low, case.size, strict=True))
    results["value"] = results["value"][(slice(None), *inner)]
    assert_same(results, run(named))


@laws
@given(geometries(), seeds, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_kernel_is_the_reference(case: Case, seed: int, dtype: torch.dtype) -> None:
    operator = operators["deform_aggregate"]
    args = operator.ordered(case.arguments(dtype, seed=seed))
    doubles = [v.double() if isinstance(v, Tensor) else v for v in args]
    actual, reference = (evaluate(f, args, operator.differentiable, dtype) for f in (operator, operator.reference))
    truth = evaluate(operator.reference, doubles, operator.differentiable, dtype)
    for name, *results in zip(("output", *NAMES), actual, truth, reference, strict=True):
        assert_close(*results, name=name)
