"""Edge cases of multi-scale deformable attention: grid lines, NaN and far points, empty calls."""

import math
from typing import Any

import pytest
import random_calls
import torch
from rooms import CALLS, Call, check, check_survives
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._shape import code_of
from deformkit.ops.ms_deform_attn.cases import Case

TENSORS = ("value", "sampling_locations", "attention_weights")
OURS = [call for call in CALLS if call.operator.name == "ms_deform_attn"]
every_case = pytest.mark.parametrize("call", OURS, ids=lambda c: c.case.name)
modes = pytest.mark.parametrize("mode", ["linear", "nearest"])
FAR = [torch.inf, -torch.inf, 1e20, -1e20, 1e38, -3e9, 1e5]


def small(axes: int, **changes: Any) -> Case:
    options: dict[str, Any] = {"batch": 2, "queries": 4, "heads": 3, "channels": 5, "points": (2, 3), **changes}
    return Case("small", sizes=((4, 5, 3)[:axes], (2, 3, 2)[:axes]), **options)


def results(case: Case, named: dict[str, Any], cotangent_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients by name."""

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return dk.ms_deform_attn(value, case.sizes, locations, weights, num_points=case.points, mode=case.mode)

    given = [named[name] for name in TENSORS]
    found = evaluate(function, given, range(3), cotangent_dtype or given[0].dtype)
    return dict(zip(("output", *TENSORS), found, strict=True))


# On grid lines

SIZE = 4  # a power of two, so that locations and their products are exact
FIELD = torch.tensor([3.0, 5.0, 11.0, 2.0])

# A point in pixels, the value there, and the derivative, which is the one to the right on a pixel.
LINEAR = [
    (-2.0, 0.0, 0.0),
    (-1.25, 0.0, 0.0),
    (-1.0, 0.0, 3.0),
    (-0.5, 1.5, 3.0),
    (0.0, 3.0, 2.0),
    (0.25, 3.5, 2.0),
    (1.0, 5.0, 6.0),
    (2.0, 11.0, -9.0),
    (3.0, 2.0, -2.0),
    (3.5, 1.0, -2.0),
    (4.0, 0.0, 0.0),
    (9.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("point", "value", "slope"), LINEAR)
@pytest.mark.parametrize(("axes", "axis"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_value_and_derivative_along_one_axis(axes: int, axis: int, point: float, value: float, slope: float) -> None:
    """A field that is constant along the other axes, sampled on a pixel along those."""
    shape = [SIZE if n == axis else 1 for n in range(axes)]
    field = FIELD.reshape(shape).expand([SIZE] * axes)
    location = torch.full((1, 1, 1, 1, axes), 1.5 / SIZE)
    location[..., axes - 1 - axis] = (point + 0.5) / SIZE
    location.requires_grad_()
    weights = torch.full((1, 1, 1, 1), 2.0, requires_grad=True)
    output = dk.ms_deform_attn(field.reshape(1, -1, 1, 1), [[SIZE] * axes], location, weights)
    along, by_weight = torch.autograd.grad(output.sum(), (location, weights))
    assert output.item() == 2 * value
    assert by_weight.item() == value
    assert along[..., axes - 1 - axis].item() == 2 * SIZE * slope


def test_location_0_and_1_are_the_outer_edges(axes: int) -> None:
    """A point half a pixel beyond the centre of the corner pixel along every axis."""
    value = torch.rand(1, SIZE**axes, 1, 1, dtype=torch.float64)
    locations = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1).expand(-1, -1, -1, -1, axes)
    output = dk.ms_deform_attn(value, [[SIZE] * axes], locations, torch.ones_like(locations[..., 0]))
    assert output.flatten().tolist() == [value[0, n].item() / 2**axes for n in (0, -1)]


def test_exactly_one_pixel_outside_learns(axes: int) -> None:
    """A point at -1 along every axis but one, where it is on a pixel: the value is 0, the inward derivative is not."""
    value = torch.rand(1, SIZE**axes, 1, 1, dtype=torch.float64) + 1
    for axis in range(axes):
        location = torch.full((1, 1, 1, 1, axes), 1.5 / SIZE, dtype=torch.float64)
        location[..., axis] = -0.5 / SIZE
        location.requires_grad_()
        output = dk.ms_deform_attn(value, [[SIZE] * axes], location, torch.ones_like(location[..., 0]))
        (gradient,) = torch.autograd.grad(output, location)
        assert output.item() == 0
        assert gradient[..., axis].item() >= SIZE
        assert gradient.count_nonzero() == 1


# The location times the size, and the pixel that is read.
NEAREST = [
    (-7.0, 0),
    (-0.5, 0),
    (0.0, 0),
    (0.25, 0),
    (0.5, 1),
    (1.0, 1),
    (1.5, 2),
    (2.25, 2),
    (2.5, 3),
    (4.0, 3),
    (9.0, 3),
]


@pytest.mark.parametrize(("scaled", "pixel"), NEAREST)
def test_the_nearest_pixel(axes: int, scaled: float, pixel: int) -> None:
    value = torch.rand(1, SIZE**axes, 1, 3)
    location = torch.full((1, 1, 1, 1, axes), scaled / SIZE, requires_grad=True)
    output = dk.ms_deform_attn(value, [[SIZE] * axes], location, torch.ones(1, 1, 1, 1), mode="nearest")
    assert_equal(output[0, 0], value[0, :, 0].reshape(*[SIZE] * axes, 3)[(pixel,) * axes])
    (gradient,) = torch.autograd.grad(output.sum(), location)
    assert_equal(gradient, torch.zeros_like(gradient))


@every_case
def test_on_grid_lines_as_the_reference(call: Call) -> None:
    """Points at every multiple of a quarter of a pixel, for sizes that are powers of two."""
    sizes = tuple(tuple(2 ** (n % 3) for n in size) for size in call.case.sizes)
    case = Case(**{**call.case.__dict__, "sizes": sizes, "near": None})
    args = Call(call.operator, case).arguments()
    args[2] = (args[2] * 16).round() / 16
    check(call, args)


# NaN and infinity


@modes
def test_nan_location_is_visible_and_local(axes: int, mode: str) -> None:
    case = small(axes, mode=mode)
    named = case.arguments()
    clean = results(case, named)
    named["sampling_locations"][1, 2, 1, 3, -1] = torch.nan
    marked = results(case, named)

    where = {name: torch.zeros_like(clean[name], dtype=torch.bool) for name in clean}
    where["output"].unflatten(-1, (3, 5))[1, 2, 1] = True
    where["sampling_locations"][1, 2, 1, 3] = True
    where["attention_weights"][1, 2, 1, 3] = True
    for name, expected in where.items():
        assert torch.equal(marked[name].isnan(), expected), name
        if name != "value":
            assert_equal(marked[name][~expected], clean[name][~expected], name)
    # The point contributes nothing to the gradient of the value, as with a weight of zero.
    named["sampling_locations"][1, 2, 1, 3, -1] = 0.0
    named["attention_weights"][1, 2, 1, 3] = 0.0
    assert_close(marked["value"], results(case, {k: _double(v) for k, v in named.items()})["value"], clean["value"])


def test_a_nan_location_shows_even_with_weight_zero(axes: int) -> None:
    case = small(axes)
    named = case.arguments()
    named["sampling_locations"][0, 0, 0, 0, 0] = torch.nan
    named["attention_weights"].zero_()
    found = results(case, named)
    assert found["output"][0, 0, :5].isnan().all() and not found["output"][0, 0, 5:].any()
    assert found["sampling_locations"][0, 0, 0, 0].isnan().all()


@modes
@every_case
@pytest.mark.parametrize("specials", [random_calls.WILD, (*random_calls.WILD, torch.nan)], ids=["far", "far and nan"])
def test_special_locations_agree_with_the_reference(call: Call, specials: tuple[float, ...], mode: str) -> None:
    args = call.arguments()
    args[-1] = code_of("mode", mode)
    values = torch.tensor(specials)[torch.randint(len(specials), args[2].shape)]
    args[2] = torch.where(torch.rand(args[2].shape) < 0.2, values, args[2])
    check(call, args)


@pytest.mark.parametrize("far", FAR)
def test_a_far_point_contributes_nothing(axes: int, far: float) -> None:
    """One far coordinate is enough, along any axis."""
    case = small(axes)
    for axis in range(axes):
        named = case.arguments()
        named["sampling_locations"][..., axis] = far
        for name, value in results(case, named).items():
            assert_equal(value, torch.zeros_like(value), name)


@pytest.mark.parametrize("far", FAR)
def test_a_far_point_reads_the_end_in_nearest_mode(axes: int, far: float) -> None:
    case = small(axes, mode="nearest", points=(1, 0))
    named = case.arguments()
    named["sampling_locations"].fill_(far)
    named["attention_weights"].fill_(1.0)
    end = named["value"][:, torch.Size(case.sizes[0]).numel() - 1 if far > 0 else 0].flatten(1)
    found = results(case, named)
    assert_equal(found["output"], end.unsqueeze(1).expand_as(found["output"]))
    assert not found["sampling_locations"].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_corner_outside_does_not_leak(axes: int, poison: float) -> None:
    """Points outside, or with a corner outside, do not read a poisoned border or the next level."""
    for scaled in (-0.75, 0.5, 2.5, 3.5, 4.5, -50.0, 50.0):  # on pixels 0, 2, 3, 4, and beyond
        case = Case("poison", 1, ((4,) * axes, (3,) * axes), 1, 2, 5, (1, 0))
        named = case.arguments()
        pixel = math.floor(scaled - 0.5)
        field = torch.full((4,) * axes, poison)
        if 0 <= pixel < 4:  # the pixel itself, and what follows it with weight zero
            field[(slice(pixel, pixel + 2),) * axes] = 1.0
        named["value"].fill_(poison)
        named["value"][:, : 4**axes] = field.reshape(1, -1, 1, 1)
        named["sampling_locations"].fill_(scaled / 4)
        for name, value in results(case, named).items():
            assert value.isfinite().all(), f"{name} at pixel {pixel}"


def test_poison_is_seen_where_it_is_read(axes: int) -> None:
    """A corner in the level counts even with weight 0, as in grid_sample; only corners outside are skipped."""
    value = torch.ones(1, SIZE**axes, 1, 1)
    value[0, 1] = torch.inf
    location = torch.full((1, 1, 1, 1, axes), 0.5 / SIZE)
    assert dk.ms_deform_attn(value, [[SIZE] * axes], location, torch.ones(1, 1, 1, 1)).isnan().all()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# Empty and small


@modes
def test_a_level_of_one_pixel(axes: int, mode: str) -> None:
    """The value fades over one pixel on each side; the nearest pixel is always the only one."""
    value = torch.tensor([3.0]).reshape(1, 1, 1, 1)
    scaled = torch.tensor([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    locations = torch.full((1, 7, 1, 1, axes), 0.5)
    locations[0, :, 0, 0, 0] = scaled
    output = dk.ms_deform_attn(value, [[1] * axes], locations, torch.ones(1, 7, 1, 1), mode=mode)
    share = [0.0, 0.5, 0.75, 1.0, 0.75, 0.5, 0.0] if mode == "linear" else [1.0] * 7
    assert output.flatten().tolist() == [3 * s for s in share]


@every_case
@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_calls(call: Call, empty: str, dtype: torch.dtype) -> None:
    case = Case(**{**call.case.__dict__, empty: 0, "near": None})
    args = Call(call.operator, case).arguments(dtype)
    found = evaluate(call.operator, args, call.positions(args), dtype)
    assert found[0].shape == (case.batch, case.queries, case.heads * case.channels)
    for value, gradient in zip((args[0], args[2], args[3]), found[1:], strict=True):
        assert_equal(gradient, torch.zeros_like(value))


def test_a_level_without_points_changes_nothing(axes: int) -> None:
    case = small(axes, points=(2, 0))
    named = case.arguments()
    found = results(case, named)
    length = torch.Size(case.sizes[0]).numel()
    alone = Case(**{**case.__dict__, "sizes": case.sizes[:1], "points": (2,)})
    expected = results(alone, {**named, "value": named["value"][:, :length]})
    for name in ("output", *TENSORS[1:]):
        assert_close(found[name], expected[name].double(), expected[name], name=name)
    assert not found["value"][:, length:].any()


# Precision


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_values_cost_their_own_rounding_alone(axes: int, half: torch.dtype) -> None:
    """Locations and sums are not rounded to half precision, on a long axis or over many points and queries."""
    for sizes in (((1000, 3, 2)[:axes],), ((2,) * axes,) * 4):
        case = Case("half", 1, sizes, 600, 2, 3, (16,) * len(sizes))
        named = case.arguments(half)
        truth = results(case, {name: _double(value) for name, value in named.items()}, half)
        for name, value in results(case, named).items():
            assert_close(value, truth[name], name=name)


# Memory

CRASH = """
for axes in (1, 2, 3):
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("linear", "nearest"):
            for special in wild:
                value = torch.randn(2, 5**axes + 2**axes, 3, 16, dtype=dtype, requires_grad=True)
                locations = torch.rand(2, 50, 3, 2, 4, axes)
                locations = torch.where(torch.rand(locations.shape) < 0.5, special, locations).requires_grad_()
                weights = torch.rand(2, 50, 3, 2, 4, dtype=dtype, requires_grad=True)
                shapes = [(5,) * axes, (2,) * axes]
                dk.ms_deform_attn(value, shapes, locations, weights, mode=mode).sum().backward()
"""


def test_wild_locations_do_not_crash() -> None:
    check_survives(CRASH)


# NaN weights


@modes
@pytest.mark.parametrize("where", [0.3, 9.0, torch.inf], ids=["inside", "outside", "infinite"])
def test_weight_that_is_no_number(mode: str, where: float) -> None:
    """A NaN weight shows in the output even if its point is outside."""
    case = small(2, mode=mode)
    call = Call(OURS[0].operator, case)
    args = call.arguments()
    args[2][:, 1, :, 2] = where
    args[3][:, 1, :, 2] = torch.nan
    output, reference = call.operator(*args), call.operator.reference(*args)
    assert_equal(output.isnan(), reference.isnan())
    assert output[:, 1].isnan().all()
    assert output[:, 0].isfinite().all()


def test_the_last_half_pixel_of_a_very_long_level() -> None:
    """At 2^40 pixels, float32 cannot represent half a pixel; location 1 is still half a pixel past the last centre."""
    value = torch.ones(1, 1, 1, 1).expand(1, 2**40, 1, 1)
    location, weight = torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert dk.reference.ms_deform_attn(value, [2**40], location, weight, [1], "linear").item() == 0.5
