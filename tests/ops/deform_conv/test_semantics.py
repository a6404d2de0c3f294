"""Edge cases of deformable convolution: NaN, infinite and far points, empty and large calls."""

from typing import Any

import pytest
import random_calls
import torch
from rooms import CALLS, Call, check, check_survives
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators
from deformkit.ops.deform_conv.cases import CASES, Case

FUNCTIONS = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}
NAMES = ["output", "input", "offset", "weight", "bias", "mask"]
OURS = [call for call in CALLS if call.operator.name == "deform_conv"]
every_case = pytest.mark.parametrize("call", OURS, ids=lambda c: c.case.name)
boundaries = pytest.mark.parametrize("boundary", ["zeros", "border"])
PLAIN = {
    1: Case("1d", 2, 4, (9,), 6, (3,), padding=1, groups=2, offset_groups=2),
    2: Case("2d", 2, 4, (5, 6), 6, (3, 3), padding=1, groups=2, offset_groups=2),
    3: Case("3d", 2, 4, (3, 4, 3), 6, (2, 3, 2), padding=1, groups=2, offset_groups=2),
}


def results(named: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients by name."""
    names, values = list(named), list(named.values())
    positions = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    function = FUNCTIONS[named["input"].dim() - 2]
    found = evaluate(lambda *v: function(**dict(zip(names, v, strict=True))), values, positions, dtype)
    return dict(zip(["output", *(names[i] for i in positions)], found, strict=True))


# NaN and infinity


@boundaries
def test_nan_offset_is_visible_and_local(axes: int, boundary: str) -> None:
    named = {**PLAIN[axes].arguments(), "boundary": boundary}
    clean = results(named)
    place = (1, -1, *[1] * axes)  # the last tap of the last offset group, its last coordinate
    named["offset"][place] = torch.nan
    marked = results(named)

    output = torch.zeros_like(clean["output"], dtype=torch.bool)
    output[(1, slice(3, 6), *[1] * axes)] = True  # the channels of the second group, which alone sample that point
    offset = torch.zeros_like(clean["offset"], dtype=torch.bool)
    offset[(1, slice(-axes, None), *[1] * axes)] = True
    mask = torch.zeros_like(clean["mask"], dtype=torch.bool)
    mask[(1, -1, *[1] * axes)] = True
    weight = torch.zeros_like(clean["weight"], dtype=torch.bool)
    weight[(slice(3, 6), slice(None), *[-1] * axes)] = True
    nothing = {name: torch.zeros_like(clean[name], dtype=torch.bool) for name in ("input", "bias")}
    expected = {"output": output, "offset": offset, "mask": mask, "weight": weight, **nothing}
    for name, where in expected.items():
        assert torch.equal(marked[name].isnan(), where), name
        if name not in ("input", "weight"):
            assert_equal(marked[name][~where], clean[name][~where], name)


@every_case
@pytest.mark.parametrize("specials", [random_calls.WILD, (*random_calls.WILD, torch.nan)], ids=["far", "far and nan"])
def test_special_offsets_agree_with_the_reference(call: Call, specials: tuple[float, ...]) -> None:
    args = call.arguments()
    values = torch.tensor(specials)[torch.randint(len(specials), args[1].shape)]
    args[1] = torch.where(torch.rand(args[1].shape) < 0.2, values, args[1])
    check(call, args)


@pytest.mark.parametrize("boundary", ["zeros", "border", "reflect"])
@pytest.mark.parametrize("size", [(100,), (7, 9), (4, 5, 6)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("share", [0.01, 0.3], ids=["seldom", "often"])
def test_special_offsets_of_every_channel(size: tuple[int, ...], boundary: str, share: float) -> None:
    case = Case("", 2, 3, size, 6, (3,) * len(size), padding=1, groups=3, offset_groups=3, boundary=boundary)
    call = Call(operators["deform_conv"], case)
    args = call.arguments()
    for specials in (random_calls.WILD, (*random_calls.WILD, torch.nan)):
        values = torch.tensor(specials)[torch.randint(len(specials), args[1].shape)]
        check(call, [args[0], torch.where(torch.rand(args[1].shape) < share, values, args[1]), *args[2:]])


@pytest.mark.parametrize("far", [torch.inf, -torch.inf, 1e30, -1e30, 1e5, -1e5])
def test_a_far_point_contributes_nothing(axes: int, far: float) -> None:
    named = PLAIN[axes].arguments()
    named["offset"][:, axes - 1 :: axes] = far
    found = results(named)
    bias = named["bias"].reshape(-1, *[1] * axes).expand_as(found["output"])
    assert_equal(found["output"], bias)
    for name in ("input", "offset", "weight", "mask"):
        assert not found[name].any(), name


@pytest.mark.parametrize("far", [torch.inf, -torch.inf, 1e30, -1e30, 1e5, -1e5])
def test_a_far_point_reads_the_border(axes: int, far: float) -> None:
    named = {**PLAIN[axes].arguments(), "boundary": "border"}
    named["offset"].fill_(far)
    found = results(named)
    corner = named["input"][(slice(None), slice(None), *[slice(-1, None) if far > 0 else slice(0, 1)] * axes)]
    named["input"] = corner.expand_as(named["input"])
    named["offset"].zero_()
    assert_close(found["output"], FUNCTIONS[axes](**{k: _double(v) for k, v in named.items()}))
    assert not found["offset"].any()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_corner_outside_does_not_leak(axes: int, poison: float) -> None:
    """Points outside do not read the poisoned border of the field, onto which their corners would be clamped."""
    named = PLAIN[axes].arguments()
    field = torch.full_like(named["input"], poison)
    field[(slice(None), slice(None), *[slice(1, -1)] * axes)] = 0.0
    named["input"] = field
    named["offset"].fill_(-100.0)
    found = results(named)
    for name in ("output", "input", "offset", "weight", "mask"):
        assert found[name].isfinite().all(), name


def test_poison_is_seen_where_it_is_read(axes: int) -> None:
    """A corner in the field counts even with weight 0, as in grid_sample; only corners outside are skipped."""
    named = PLAIN[axes].arguments()
    named.update(offset=torch.zeros_like(named["offset"]), mask=None)
    named["input"][(0, 0, *[2] * axes)] = torch.inf
    found = FUNCTIONS[axes](**named)
    expected = operators["deform_conv"].reference(*operators["deform_conv"].ordered(named))
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not found[0].isfinite().all() and found[1].isfinite().all()


@every_case
def test_on_grid_lines_as_the_reference(call: Call) -> None:
    args = call.arguments()
    args[1] = args[1].round()
    check(call, args)
    args[1] = torch.zeros_like(args[1])
    check(call, args)


def test_a_zero_offset_at_the_padding_can_start_to_learn(axes: int) -> None:
    """The derivative at exactly -1, where a padded layer without offsets has its first tap, is the right-hand one."""
    input = torch.full((1, 1, *[4] * axes), 3.0)
    offset = torch.zeros(1, axes, *[6] * axes, requires_grad=True)
    FUNCTIONS[axes](input, offset, torch.ones(1, 1, *[1] * axes), padding=1).sum().backward()
    for axis in range(axes):
        line = offset.grad[0, axis].movedim(axis, -1)[(*[2] * (axes - 1), slice(None))]
        assert line.tolist() == [3, 0, 0, 0, -3, 0]  # at -1, 0, 1, 2, 3 and, at the far end, 4


# Empty and small


@boundaries
def test_batch_zero_forward_and_backward(axes: int, boundary: str, dtype: torch.dtype) -> None:
    named = PLAIN[axes].arguments(dtype)
    shapes = {name: v.shape for name, v in named.items() if isinstance(v, Tensor)}
    named.update({name: named[name][:0] for name in ("input", "offset", "mask")}, boundary=boundary)
    found = results(named, dtype)
    assert found["output"].shape == (0, 6, *shapes["offset"][2:])
    for name in ("input", "offset", "mask"):
        assert found[name].shape == (0, *shapes[name][1:])
    for name in ("weight", "bias"):
        assert_equal(found[name], torch.zeros(shapes[name], dtype=dtype))


@every_case
def test_batch_zero_by_the_reference(call: Call) -> None:
    args = call.arguments()
    args = [v[:0] if i in call.operator.batched and v is not None else v for i, v in enumerate(args)]
    found = [evaluate(f, args, call.positions(args), torch.float32) for f in (call.operator, call.operator.reference)]
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)


def test_batch_zero_under_vmap(axes: int) -> None:
    named = PLAIN[axes].arguments()
    empty = {name: named[name][:0] for name in ("input", "offset", "mask")}
    function = torch.func.vmap(lambda x: FUNCTIONS[axes](**{**named, **empty, "input": x}))
    assert function(torch.zeros(3, *empty["input"].shape)).shape[:3] == (3, 0, 6)


@pytest.mark.parametrize("batch", [1, 7, 11, 13])
def test_any_batch_size(batch: int) -> None:
    """More elements than the gradient of the weight has partial sums, and sizes that divide nothing evenly."""
    for case in (CASES[0], CASES[5], CASES[10]):
        call = Call(operators["deform_conv"], Case(**{**case.__dict__, "batch": batch}))
        check(call, call.arguments())


# Memory


CRASH = """
for axes, function in ((1, dk.deform_conv1d), (2, dk.deform_conv2d), (3, dk.deform_conv3d)):
    for dtype in (torch.float32, torch.bfloat16):
        for boundary in ("zeros", "border"):
            for value in wild:
                input = torch.randn(2, 16, *[5] * axes, dtype=dtype, requires_grad=True)
                weight = torch.randn(4, 8, *[3] * axes, dtype=dtype, requires_grad=True)
                offset = torch.randn(2, 2 * axes * 3**axes, *[5] * axes, dtype=dtype)
                offset = torch.where(torch.rand(offset.shape) < 0.5, torch.tensor(value).to(dtype), offset)
                offset.requires_grad_()
                function(input, offset, weight, padding=1, boundary=boundary).sum().backward()
"""


def test_wild_offsets_do_not_crash() -> None:
    check_survives(CRASH)
