"""Edge cases of deformable aggregation: NaN, infinite and far points, empty and large calls."""

from dataclasses import replace
from typing import Any

import pytest
import random_calls
import torch
from rooms import CALLS, Call, check, check_survives
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators
from deformkit.ops.deform_aggregate.cases import Case

OPERATOR = operators["deform_aggregate"]
NAMES = ["output", "value", "offset", "weight"]
OURS = [call for call in CALLS if call.operator is OPERATOR]
every_case = pytest.mark.parametrize("call", OURS, ids=lambda c: c.case.name)
boundaries = pytest.mark.parametrize("boundary", ["zeros", "border"])
PLAIN = {
    1: Case("1d", 2, (9,), 3, 4, (3,), padding=1),
    2: Case("2d", 2, (5, 6), 3, 4, (3, 3), padding=1),
    3: Case("3d", 2, (3, 4, 3), 3, 4, (2, 3, 2), padding=1),
}


def results(named: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients by name."""
    found = evaluate(
        lambda *v: dk.deform_aggregate(**dict(zip(named, v, strict=True))), list(named.values()), [0, 1, 2], dtype
    )
    return dict(zip(NAMES, found, strict=True))


# NaN and infinity


@boundaries
def test_nan_offset_is_visible_and_local(axes: int, boundary: str) -> None:
    named = {**PLAIN[axes].arguments(), "boundary": boundary}
    clean = results(named)
    place = (1, *[1] * axes, 2, 1)  # image, position, head, tap
    named["offset"][(*place, 0)] = torch.nan
    marked = results(named)
    for name, where in {"output": place[:-1], "offset": place, "weight": place, "value": None}.items():
        expected = torch.zeros_like(clean[name], dtype=torch.bool)
        if where is not None:
            expected[where] = True
        assert torch.equal(marked[name].isnan(), expected), name
        if name != "value":  # whose gradient lacks the contribution of the point
            assert_equal(marked[name][~expected], clean[name][~expected], name)


@every_case
@pytest.mark.parametrize("specials", [random_calls.WILD, (*random_calls.WILD, torch.nan)], ids=["far", "far and nan"])
def test_special_offsets_agree_with_the_reference(call: Call, specials: tuple[float, ...]) -> None:
    named = call.case.arguments()
    values = torch.tensor(specials)[torch.randint(len(specials), named["offset"].shape)]
    named["offset"] = torch.where(torch.rand(named["offset"].shape) < 0.2, values, named["offset"])
    check(call, call.operator.ordered(named))


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("far", [torch.inf, -torch.inf, 1e20, -1e20, 3e38, 1e5, -1e5])
def test_a_far_point_contributes_nothing(axes: int, far: float, scale: float) -> None:
    named = {**PLAIN[axes].arguments(), "offset_scale": scale}
    named["offset"][..., -1] = far
    for name, found in results(named).items():
        assert not found.any(), name


@pytest.mark.parametrize("far", [torch.inf, -torch.inf, 1e20, -1e20, 1e5, -1e5])
def test_a_far_point_reads_the_border(axes: int, far: float) -> None:
    named = {**PLAIN[axes].arguments(), "boundary": "border"}
    named["offset"].fill_(far)
    found = results(named)
    corner = named["value"][(slice(None), *[slice(-1, None) if far > 0 else slice(0, 1)] * axes)]
    whole = corner.double() * named["weight"].double().sum(-1, keepdim=True)
    assert_close(found["output"], whole)
    assert not found["offset"].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_corner_outside_does_not_leak(axes: int, poison: float) -> None:
    """Points outside do not read the poisoned border of the field, onto which their corners would be clamped."""
    named = PLAIN[axes].arguments()
    field = torch.full_like(named["value"], poison)
    field[(slice(None), *[slice(1, -1)] * axes)] = 0.0
    named["value"] = field
    named["offset"].fill_(-100.0)
    for name, found in results(named).items():
        assert found.isfinite().all(), name


def test_poison_is_seen_where_it_is_read(axes: int) -> None:
    """A corner in the field counts even with weight 0, as in grid_sample; only corners outside are skipped."""
    named = PLAIN[axes].arguments()
    named["offset"] = torch.zeros_like(named["offset"])
    named["value"][(0, *[2] * axes, 1, 3)] = torch.inf
    found = dk.deform_aggregate(**named)
    expected = OPERATOR.reference(*OPERATOR.ordered(named))
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not found[0, ..., 1, 3].isfinite().all() and found[1].isfinite().all()
    found[..., 1, 3] = 0
    assert found.isfinite().all(), "another head or channel"


@every_case
def test_on_grid_lines_as_the_reference(call: Call) -> None:
    named = call.case.arguments()
    # float32 represents these scales exactly; any other one puts points beside the grid lines, on either side.
    named["offset_scale"] = round(4 * named["offset_scale"]) / 4
    named["offset"] = named["offset"].round()
    check(call, call.operator.ordered(named))
    named["offset"] = torch.zeros_like(named["offset"])
    check(call, call.operator.ordered(named))


def test_a_zero_offset_at_the_padding_can_start_to_learn(axes: int) -> None:
    """The derivative at exactly -1, where a padded layer without offsets has its first tap, is the right-hand one."""
    value = torch.full((1, *[4] * axes, 1, 1), 3.0)
    offset = torch.zeros(1, *[6] * axes, 1, 1, axes, requires_grad=True)
    dk.deform_aggregate(value, offset, torch.ones(1, *[6] * axes, 1, 1), 1, padding=1).sum().backward()
    for axis in range(axes):
        line = offset.grad[0, ..., 0, 0, axis].movedim(axis, -1)[(*[2] * (axes - 1), slice(None))]
        assert line.tolist() == [3, 0, 0, 0, -3, 0]  # at -1, 0, 1, 2, 3 and, at the far end, 4


def test_a_scale_of_zero_reads_the_centre(axes: int) -> None:
    """Every tap samples the centre of its window, and no offset moves it."""
    named = {**PLAIN[axes].arguments(), "kernel_size": [3] * axes, "padding": [1] * axes, "offset_scale": 0.0}
    maps = (2, *PLAIN[axes].size, 3, 3**axes)
    named.update(offset=torch.randn(*maps, axes), weight=torch.rand(maps))
    found = results(named)
    assert_close(found["output"], named["value"].double() * named["weight"].double().sum(-1, keepdim=True))
    assert not found["offset"].any()


# Empty and small


@boundaries
def test_batch_zero_forward_and_backward(axes: int, boundary: str, dtype: torch.dtype) -> None:
    named = PLAIN[axes].arguments(dtype)
    named.update({name: named[name][:0] for name in NAMES[1:]}, boundary=boundary)
    found = results(named, dtype)
    assert found["output"].shape == (0, *named["offset"].shape[1:-2], 4)
    for name in NAMES[1:]:
        assert found[name].shape == named[name].shape


@every_case
def test_batch_zero_by_the_reference(call: Call) -> None:
    args = call.arguments()
    args = [v[:0] if i in call.operator.batched else v for i, v in enumerate(args)]
    found = [evaluate(f, args, call.positions(args), torch.float32) for f in (call.operator, call.operator.reference)]
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("batch", [1, 7, 11])
@pytest.mark.parametrize("channels", [1, 2, 7, 9, 17, 33])
def test_any_batch_and_any_number_of_channels(batch: int, channels: int) -> None:
    for axes, heads in ((1, 5), (2, 1), (3, 3)):
        call = Call(OPERATOR, Case(**{**PLAIN[axes].__dict__, "batch": batch, "channels": channels, "heads": heads}))
        check(call, call.arguments())


# Memory


CRASH = """
for axes in (1, 2, 3):
    for dtype in (torch.float32, torch.bfloat16):
        for boundary in ("zeros", "border"):
            for value in wild:
                field = torch.randn(2, *[5] * axes, 2, 16, dtype=dtype, requires_grad=True)
                weight = torch.randn(2, *[5] * axes, 2, 3**axes, dtype=dtype, requires_grad=True)
                offset = torch.randn(*weight.shape, axes, dtype=dtype)
                offset = torch.where(torch.rand(offset.shape) < 0.5, torch.tensor(value).to(dtype), offset)
                offset.requires_grad_()
                dk.deform_aggregate(
                    field, offset, weight, 3, padding=1, offset_scale=100.0, boundary=boundary
                ).sum().backward()
"""


def test_wild_offsets_do_not_crash() -> None:
    check_survives(CRASH)


# NaN weights


@boundaries
@pytest.mark.parametrize("where", [0.3, 90.0, torch.inf], ids=["inside", "outside", "infinite"])
def test_weight_that_is_no_number(axes: int, boundary: str, where: float) -> None:
    """A NaN weight shows in the output even if its point is outside."""
    call = Call(OPERATOR, replace(PLAIN[axes], boundary=boundary))
    args = call.arguments()
    place = (0, *[1] * axes, 1, 2)
    args[1][place] = where
    args[2][place] = torch.nan
    output, reference = OPERATOR(*args), OPERATOR.reference(*args)
    assert_equal(output.isnan(), reference.isnan())
    assert output[place[:-1]].isnan().all()
    assert output[1].isfinite().all()
