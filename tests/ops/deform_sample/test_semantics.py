"""What deformable sampling promises at the edges: undefined, infinite and far points, any layout, empty calls."""

from dataclasses import replace
from typing import Any

import pytest
import random_calls
import torch
from rooms import CALLS, LAYOUTS, Call, check, check_survives
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators
from deformkit.ops.deform_sample.cases import Case

OPERATOR = operators["deform_sample"]
OURS = [call for call in CALLS if call.operator is OPERATOR]
every_case = pytest.mark.parametrize("call", OURS, ids=lambda c: c.case.name)
BOUNDARIES = ("zeros", "border", "reflect")
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
modes = pytest.mark.parametrize("mode", ["linear", "nearest"])


def results(named: dict[str, Any]) -> list[Tensor]:
    """Output and gradients by input and points."""
    return evaluate(
        lambda *v: dk.deform_sample(**dict(zip(named, v, strict=True))), list(named.values()), [0, 1], torch.float32
    )


@boundaries
@modes
@pytest.mark.parametrize("channels", [2, 16])
def test_nan_is_visible_and_local(axes: int, boundary: str, mode: str, channels: int) -> None:
    case = Case("nan", 2, channels, (7, 5, 4)[:axes], (9, 8, 2)[:axes], groups=2, boundary=boundary, mode=mode)
    named = case.arguments()
    clean = results(named)
    place = (3,) + (1,) * (axes - 1)
    named["points"][(1, 0, *place, -1)] = torch.nan
    marked = results(named)
    of_place = marked[0][(1, slice(channels // 2), *place)]
    assert of_place.isnan().all() and marked[0].isnan().sum() == channels // 2
    assert marked[2][(1, 0, *place)].isnan().all() and marked[2].isnan().sum() == axes
    assert marked[1].isfinite().all()
    for i in (0, 2):
        assert_equal(marked[i][~marked[i].isnan()], clean[i][~marked[i].isnan()])


@every_case
def test_special_points_agree_with_the_reference(call: Call) -> None:
    for specials in (random_calls.WILD, (*random_calls.WILD, torch.nan)):
        named = call.case.arguments()
        values = torch.tensor(specials)[torch.randint(len(specials), named["points"].shape)]
        named["points"] = torch.where(torch.rand(named["points"].shape) < 0.2, values, named["points"])
        check(call, call.operator.ordered(named))


@every_case
def test_on_grid_lines_as_the_reference(call: Call) -> None:
    named = call.case.arguments()
    named["points"] = (2 * named["points"]).round() / 2
    check(call, call.operator.ordered(named))


def test_infinity(axes: int) -> None:
    """Outside; the end of the axis; and where a field is mirrored a pixel of it, always the same."""
    named = Case("far", 1, 9, (5, 4, 3)[:axes], (6,) * axes).arguments()
    for far in (torch.inf, -torch.inf):
        named["points"] = torch.full_like(named["points"], far)
        for boundary in BOUNDARIES:
            output, _, by_points = results({**named, "boundary": boundary})
            last = named["input"][(..., *[-1 if far > 0 else 0] * axes)]
            end = {"zeros": 0, "border": last.reshape(1, 9, *[1] * axes)}
            near = torch.tensor([2.0**30 if far > 0 else -(2.0**30)]).expand_as(named["points"])
            end["reflect"] = dk.deform_sample(named["input"], near, boundary="reflect")
            assert (output == end[boundary]).all() and not by_points.any()


def test_reflection_repeats_the_mirrored_field(axes: int) -> None:
    """Reflected points lie in a field to which its mirror images are joined."""
    input = torch.randn(1, 9, *(4, 3, 2)[:axes], dtype=torch.float64)
    whole, middle = input, torch.tensor((4.0, 3.0, 2.0)[:axes], dtype=torch.float64)
    for axis in range(2, axes + 2):
        whole = torch.cat([whole.flip(axis), whole, whole.flip(axis)], axis)
    points = torch.rand(1, 1, 200, axes, dtype=torch.float64) * (3 * middle - 1) - middle
    expected = dk.deform_sample(whole, points + middle)
    assert_close(dk.deform_sample(input, points, boundary="reflect"), expected)


def test_a_period_of_reflection() -> None:
    """0 1 2 2 1 0 0 1 2 and so on, also where a float32 holds every other number only."""
    input = torch.arange(3.0).reshape(1, 1, 3)
    points = torch.cat([torch.arange(-7.0, 8.0), torch.tensor([6.0 * 2**23, 6.0 * 2**23 + 2 * 6 + 4])])
    found = dk.deform_sample(input, points.reshape(1, 1, -1, 1), boundary="reflect").flatten().tolist()
    assert found == [0, 0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1, 0, 1]


@boundaries
@pytest.mark.parametrize("channels", [1, 8])
def test_a_corner_outside_does_not_leak(axes: int, boundary: str, channels: int) -> None:
    """The first and the last element are poison: points outside, and those with no corner there, do not see it."""
    size = (4, 5, 3)[:axes]
    case = Case("poison", 1, channels, size, (40,) + (1,) * (axes - 1), boundary=boundary)
    named = case.arguments()
    field = named["input"].flatten(2)
    field[..., 0], field[..., -1] = torch.inf, torch.nan
    named["input"] = field.unflatten(2, size)
    expected = OPERATOR.reference(*OPERATOR.ordered(named))
    assert_equal(OPERATOR(*OPERATOR.ordered(named)).isfinite(), expected.isfinite())
    named["points"].fill_(-9.0)
    assert boundary != "zeros" or not dk.deform_sample(**named).any()


def test_an_infinite_end_counts_alike_for_every_point_beyond_it(axes: int) -> None:
    """Of as many points as registers hold, and of those that fill none."""
    input = torch.full((1, 1, *(4, 5, 3)[:axes]), torch.inf)
    points = torch.full((1, 1, 37, axes), -3.0)
    points[:, :, 20:, 0] = 9.0
    expected = dk.reference.deform_sample(input, points, "border", "linear")
    assert_equal(dk.deform_sample(input, points, boundary="border"), expected)


@pytest.mark.parametrize("call", [OURS[0], OURS[6], OURS[7], OURS[13]], ids=lambda c: c.case.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
def test_any_layout(call: Call, layout: Any) -> None:
    check(call, [layout(v) if isinstance(v, Tensor) else v for v in call.arguments()])


@pytest.mark.parametrize("channels", [1, 2, 7, 9, 17, 33, 70])
def test_any_number_of_channels(channels: int) -> None:
    for axes in (1, 2, 3):
        case = Case("any", 7, channels, (9, 5, 3)[:axes], (37,) + (2,) * (axes - 1), boundary=BOUNDARIES[axes - 1])
        for dtype in (torch.float32, torch.bfloat16):
            check(Call(OPERATOR, case), OPERATOR.ordered(case.arguments(dtype)))


@boundaries
def test_empty_calls(axes: int, boundary: str) -> None:
    case = Case("empty", 2, 9, (4, 3, 2)[:axes], (5,) * axes, boundary=boundary)
    named = case.arguments()
    for batch, points in ((0, 5), (2, 0), (0, 0)):
        some = {**named, "input": named["input"][:batch], "points": named["points"][:batch, :, :points]}
        output, by_input, by_points = results(some)
        assert output.shape == (batch, 9, points, *case.out_size[1:])
        assert by_input.shape == some["input"].shape and not by_input.any()
        assert by_points.shape == some["points"].shape


def test_fields_of_one_element(axes: int) -> None:
    for boundary in BOUNDARIES:
        call = Call(OPERATOR, Case("one", 2, 9, (1,) * axes, (30,) + (1,) * (axes - 1), boundary=boundary))
        check(call, call.arguments())
        check(replace(call, case=replace(call.case, channels=1, mode="nearest")), call.arguments())


CRASH = """
for axes in (1, 2, 3):
    for dtype in (torch.float32, torch.bfloat16):
        for boundary in ("zeros", "border", "reflect"):
            for mode in ("linear", "nearest"):
                for value in wild:
                    field = torch.randn(2, 16, *[5] * axes, dtype=dtype, requires_grad=True)
                    points = torch.randn(2, 2, 40, axes)
                    points = torch.where(torch.rand(points.shape) < 0.5, torch.tensor(value), points).requires_grad_()
                    dk.deform_sample(field, points, boundary=boundary, mode=mode).sum().backward()
                    one = torch.randn(2, 2, *[5] * axes, dtype=dtype, requires_grad=True)
                    dk.deform_sample(one, points, boundary=boundary, mode=mode).sum().backward()
"""


def test_wild_points_do_not_crash() -> None:
    check_survives(CRASH)
