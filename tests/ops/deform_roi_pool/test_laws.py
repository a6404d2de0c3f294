"""Laws of deformable RoI pooling, on random geometries from hypothesis."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from rooms import double, needs_kernel
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators
from deformkit.ops.deform_roi_pool.cases import Case

laws = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def geometries(draw: st.DrawFn, most_axes: int = 3, **fixed: Any) -> Case:
    axes = draw(st.integers(1, most_axes))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    drawn = {
        "batch": draw(st.integers(1, 3)),
        "channels": draw(st.integers(1, 5)),
        "size": each(1, 12 if axes < 3 else 6),
        "rois": draw(st.integers(1, 5)),
        "output_size": each(1, 4 if axes < 3 else 2),
        "spatial_scale": draw(st.sampled_from([1.0, 0.5, 1 / 16, 3.0])),
        "sampling_ratio": draw(st.integers(0, 3)),
        "gamma": draw(st.sampled_from([0.1, 0.5, -0.3])),
        "with_offset": draw(st.booleans()),
        "bin_size": draw(st.sampled_from([1.0, 2.5, 4.0])),
        "spread": draw(st.sampled_from([0.0, 0.5, 1.5])),
    }
    return Case("drawn", **{**drawn, **fixed})


def run(named: dict[str, Any]) -> dict[str, Tensor]:
    """The output and every gradient, by name. The cotangent is the cosine of the output, to move with it."""
    leaves = {k: named[k].detach().requires_grad_() for k in ("input", "offset") if named[k] is not None}
    output = dk.deform_roi_pool(**{**named, **leaves})
    grads = torch.autograd.grad(output, list(leaves.values()), output.detach().cos())
    return dict(zip(["output", *leaves], [output.detach(), *grads], strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name=name)


def corners(rois: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high corners ``[R, N]`` in the order of the input's axes."""
    low, high = rois[:, 1:].chunk(2, 1)
    return low.flip(1), high.flip(1)


def with_corners(rois: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.cat([rois[:, :1], low.flip(1), high.flip(1)], 1)


@laws
@given(geometries(with_offset=False, spread=0.0), seeds)
def test_a_constant_is_pooled_to_itself(case: Case, seed: int) -> None:
    """Up to the clamped edge the weights of the samples add up to 1."""
    size = tuple(n + 16 for n in case.size)
    named = Case(**{**case.__dict__, "size": size}).arguments(torch.float64, seed=seed)
    named["input"] = named["input"][..., :1].flatten(1)[:, :1].reshape(-1, *[1] * (case.axes + 1))
    output = dk.deform_roi_pool(**{**named, "input": named["input"].expand(-1, case.channels, *size)})
    assert_close(output, named["input"][named["rois"][:, 0].long()].expand_as(output))


@laws
@given(geometries(most_axes=2), seeds, st.data())
def test_a_unit_axis_changes_nothing(case: Case, seed: int, data: st.DataObject) -> None:
    """A k-D call equals the (k+1)-D call with an additional axis of size 1 at any place."""
    named = case.arguments(torch.float64, seed=seed)
    place = data.draw(st.integers(0, case.axes))
    x_first = case.axes - place
    low, high = named["rois"][:, 1:].chunk(2, 1)
    # No sample is at exactly 0: if a sample is clamped, the derivative is exactly 0.
    new = torch.tensor([0.1, 0.7], dtype=torch.float64).expand(case.rois, 2) / case.spatial_scale
    sides = [
        torch.cat([c[:, :x_first], n, c[:, x_first:]], 1) for c, n in zip((low, high), new.split(1, 1), strict=True)
    ]
    lifted = {
        **named,
        "input": named["input"].unsqueeze(2 + place),
        "rois": torch.cat([named["rois"][:, :1], *sides], 1),
        "output_size": [*case.output_size[:place], 1, *case.output_size[place:]],
    }
    if case.with_offset:
        parts = list(named["offset"].unbind(1))
        parts.insert(x_first, torch.zeros_like(parts[0]))
        lifted["offset"] = torch.stack(parts, 1).unsqueeze(2 + place)
    results = run(lifted)
    results = {name: value.squeeze(2 + place) for name, value in results.items()}
    if case.with_offset:
        by_axis = list(results["offset"].unbind(1))
        assert not by_axis.pop(x_first).any()
        results["offset"] = torch.stack(by_axis, 1)
    assert_same(results, run(named))


@laws
@given(geometries(), seeds, st.data())
def test_moving_input_and_rois_together_changes_nothing(case: Case, seed: int, data: st.DataObject) -> None:
    """RoIs in the middle of an input, and in the same input with more around it."""
    room = [2 * int(case.bin_size + 1) * n + 20 for n in case.output_size]
    inner = Case(**{**case.__dict__, "size": tuple(room), "gamma": 0.05})
    named = inner.arguments(torch.float64, seed=seed)
    low, high = corners(named["rois"])
    to_middle = (
        torch.tensor(room, dtype=torch.float64) / 2 - (low + high) / 2 * case.spatial_scale
    ).round() / case.spatial_scale
    named["rois"] = with_corners(named["rois"], low + to_middle, high + to_middle)
    before = [data.draw(st.integers(0, 3)) for _ in room]
    after = [data.draw(st.integers(0, 3)) for _ in room]
    low, high = corners(named["rois"])
    shift = torch.tensor(before, dtype=torch.float64) / case.spatial_scale
    widths = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    moved = {**named, "rois": with_corners(named["rois"], low + shift, high + shift)}
    moved["input"] = F.pad(named["input"], widths, value=torch.nan)
    results = run(moved)
    where = tuple(slice(b, b + n) for b, n in zip(before, room, strict=True))
    results["input"] = results["input"][(slice(None), slice(None), *where)]
    assert_same(results, run(named))


@laws
@given(geometries(), seeds, st.data())
def test_a_mirror(case: Case, seed: int, data: st.DataObject) -> None:
    """Reversing an axis of the input with its corners and offsets reverses the bins: both edges have the same rule."""
    named = case.arguments(torch.float64, seed=seed)
    axis = data.draw(st.integers(0, case.axes - 1))
    low, high = (c.clone() for c in corners(named["rois"]))
    far = case.size[axis] / case.spatial_scale
    low[:, axis], high[:, axis] = far - high[:, axis], far - low[:, axis]
    mirrored = {
        **named,
        "input": named["input"].flip(2 + axis),
        "rois": with_corners(named["rois"], low, high),
    }
    sign = torch.ones(case.axes, dtype=torch.float64)
    sign[case.axes - 1 - axis] = -1
    sign = sign.reshape(-1, *[1] * case.axes)
    if case.with_offset:
        mirrored["offset"] = named["offset"].flip(2 + axis) * sign
    results = {name: value.flip(2 + axis) for name, value in run(mirrored).items()}
    if case.with_offset:
        results["offset"] = results["offset"] * sign
    assert_same(results, run(named))


@laws
@given(geometries(), seeds)
def test_the_scale_multiplies_the_rois(case: Case, seed: int) -> None:
    named = case.arguments(torch.float64, seed=seed)
    scaled = {**named, "rois": named["rois"].clone(), "spatial_scale": 1.0}
    scaled["rois"][:, 1:] *= case.spatial_scale
    assert_same(run(scaled), run(named))


@needs_kernel("deform_roi_pool")
@laws
@given(geometries(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.data())
def test_rois_are_separate(case: Case, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """The result of a RoI is bit-identical in another order or alone; the gradients of the input add up."""
    named = case.arguments(dtype, seed=seed)
    names = ["rois", *(["offset"] if case.with_offset else [])]
    whole = run(named)
    order = data.draw(st.permutations(range(case.rois)))
    permuted = run({**named, **{name: named[name][list(order)] for name in names}})
    for name in ("output", *names[1:]):
        assert_equal(permuted[name], whole[name][list(order)], name)
    doubled = dict(zip(named, double(list(named.values())), strict=True))
    cut = data.draw(st.integers(0, case.rois))
    parts = [slice(0, cut), slice(cut, None)]
    alone = [run({**named, **{name: named[name][part] for name in names}}) for part in parts]
    for name in ("output", *names[1:]):
        assert_equal(torch.cat([result[name] for result in alone]), whole[name], name)
    truth = run(doubled)["input"]
    assert_close(permuted["input"], truth, whole["input"])
    if dtype == torch.float64:
        assert_close(alone[0]["input"] + alone[1]["input"], truth)


@laws
@given(geometries(), seeds)
def test_adjoint_in_input(case: Case, seed: int) -> None:
    """The operator is linear in input, and the gradient is the adjoint: <A x, y> = <x, A' y>."""
    named = case.arguments(torch.float64, seed=seed)
    x = torch.randn(named["input"].shape, dtype=torch.float64)
    leaf = named["input"].detach().requires_grad_()
    output = dk.deform_roi_pool(**{**named, "input": leaf})
    y = torch.randn(output.shape, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(output, leaf, y)
    forward, backward = dk.deform_roi_pool(**{**named, "input": x}) * y, x * adjoint
    magnitude = forward.abs().sum() + backward.abs().sum()
    # Relative to the sum of the magnitudes, on which rounding depends: the terms may cancel.
    assert_close(forward.sum() - backward.sum() + magnitude, magnitude)


@laws
@given(geometries(with_offset=False), seeds, st.data())
def test_an_offset_of_one_bin_is_the_next_bin(case: Case, seed: int, data: st.DataObject) -> None:
    named = case.arguments(torch.float64, seed=seed)
    axis = data.draw(st.integers(0, case.axes - 1))
    plain = dk.deform_roi_pool(**named)
    named["offset"] = torch.zeros(case.rois, case.axes, *case.output_size, dtype=torch.float64)
    assert_equal(dk.deform_roi_pool(**named), plain)
    named["offset"][:, case.axes - 1 - axis] = 1 / (case.gamma * case.output_size[axis])
    moved = dk.deform_roi_pool(**named)
    bins = case.output_size[axis] - 1
    assert_close(moved.narrow(2 + axis, 0, bins), plain.narrow(2 + axis, 1, bins))


@laws
@given(geometries(with_offset=False).filter(lambda case: case.sampling_ratio > 0), seeds, st.data())
def test_an_inverted_roi_is_sampled_backwards(case: Case, seed: int, data: st.DataObject) -> None:
    named = case.arguments(torch.float64, seed=seed)
    axis = data.draw(st.integers(0, case.axes - 1))
    low, high = (c.clone() for c in corners(named["rois"]))
    low[:, axis], high[:, axis] = high[:, axis].clone(), low[:, axis].clone()
    found = dk.deform_roi_pool(**{**named, "rois": with_corners(named["rois"], low, high)})
    assert_close(found.flip(2 + axis), dk.deform_roi_pool(**named))


@laws
@given(geometries(sampling_ratio=1, with_offset=False), seeds, st.integers(2, 3))
def test_samples_are_the_mean_of_finer_bins(case: Case, seed: int, ratio: int) -> None:
    """n samples in a bin equal one sample in each of n times as many bins."""
    named = case.arguments(torch.float64, seed=seed)
    fine = dk.deform_roi_pool(**{**named, "output_size": [n * ratio for n in case.output_size]})
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[case.axes]
    assert_close(dk.deform_roi_pool(**{**named, "sampling_ratio": ratio}), pool(fine, ratio))


@laws
@given(geometries(), seeds, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_kernel_is_the_reference(case: Case, seed: int, dtype: torch.dtype) -> None:
    operator = operators["deform_roi_pool"]
    args = list(case.arguments(dtype, seed=seed).values())
    positions = [i for i in operator.differentiable if args[i] is not None]
    actual, reference = (evaluate(f, args, positions, dtype) for f in (operator, operator.reference))
    truth = evaluate(operator.reference, double(args), positions, dtype)
    for i, results in enumerate(zip(actual, truth, reference, strict=True)):
        assert_close(*results, name=f"result {i}")
