"""Edge cases of deformable RoI pooling: NaN, infinite, empty, inverted and far regions."""

from typing import Any

import pytest
import random_calls
import torch
from rooms import CALLS, Call, check, check_survives
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops.deform_roi_pool.cases import Case

OURS = [call for call in CALLS if call.operator.name == "deform_roi_pool"]
every_case = pytest.mark.parametrize("call", OURS, ids=lambda c: c.case.name)
ratios = pytest.mark.parametrize("ratio", [0, 2], ids=["adaptive", "fixed"])
PLAIN = {
    1: Case("1d", 2, 4, (9,), 4, (3,)),
    2: Case("2d", 2, 4, (7, 8), 4, (2, 3)),
    3: Case("3d", 2, 4, (5, 4, 6), 4, (1, 2, 2)),
}


def results(named: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients by name, for a random cotangent."""
    names, values = list(named), list(named.values())
    positions = [names.index(name) for name in ("input", "offset") if named[name] is not None]
    found = evaluate(
        lambda *v: dk.deform_roi_pool(**dict(zip(names, v, strict=True))), values, positions, named["input"].dtype
    )
    return dict(zip(["output", *(names[i] for i in positions)], found, strict=True))


def box(axes: int, low: float, high: float, image: float = 0.0) -> list[float]:
    return [image, *[low] * axes, *[high] * axes]


# Inside and outside


def test_one_bin_by_hand() -> None:
    """The four samples of an aligned bin of 2 by 2 pixels are the four pixels."""
    input = torch.arange(20.0).reshape(1, 1, 4, 5)
    rois = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])  # x from 1 to 3, y from 2 to 4
    assert dk.deform_roi_pool(input, rois, output_size=1).item() == (11 + 12 + 16 + 17) / 4 == 14
    columns = dk.deform_roi_pool(input, rois, output_size=(1, 2))
    assert columns.flatten().tolist() == [(11 + 16) / 2, (12 + 17) / 2]
    offset = torch.zeros(1, 2, 1, 1)
    offset[0, 0] = 0.5  # of the width of 2, along x: to the right by one pixel
    assert dk.deform_roi_pool(input, rois, offset, output_size=1, gamma=1.0).item() == (12 + 13 + 17 + 18) / 4
    assert dk.deform_roi_pool(input, rois * 8, output_size=1, spatial_scale=1 / 8).item() == 14


@pytest.mark.parametrize("place", [-1.0, 4.0])
def test_a_sample_on_the_outer_edge_counts(axes: int, place: float, dtype: torch.dtype) -> None:
    """A sample at exactly -1, or at exactly the size, is the pixel at the edge; just beyond it is 0."""
    input = torch.full((1, 1, *[4] * axes), 3.0, dtype=dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    at = torch.tensor([box(axes, place + 0.5, place + 0.5)], dtype=kind)
    beyond = torch.tensor([box(axes, 1.5, 1.5)], dtype=kind)
    beyond[0, axes::axes] = (place - 1.5) * 1.0001 + 2.0  # one axis alone
    for rois, expected in ((at, 3.0), (beyond, 0.0)):
        assert dk.deform_roi_pool(input, rois, output_size=1, sampling_ratio=1).item() == expected


@ratios
def test_a_roi_outside_is_zero(axes: int, ratio: int) -> None:
    named = {**PLAIN[axes].arguments(), "sampling_ratio": ratio}
    named["rois"][0, 1:] = torch.tensor(box(axes, 20.0, 25.0))[1:]
    named["rois"][1, 1:] = torch.tensor(box(axes, -25.0, -20.0))[1:]
    found = results(named)
    assert not found["output"][:2].any() and not found["offset"][:2].any()
    assert found["output"][2:].any()


def test_an_image_without_a_roi_has_no_gradient(axes: int) -> None:
    named = PLAIN[axes].arguments()
    named["rois"][:, 0] = 1.0
    found = results(named)
    assert not found["input"][0].any() and found["input"][1].any()


def test_where_a_sample_is_clamped_the_derivative_is_zero(axes: int) -> None:
    """A sample half a pixel outside is the pixel at the edge, and stays so if it moves a little."""
    input = torch.randn(1, 3, *[4] * axes)
    for place in (-0.75, 3.5):
        rois = torch.tensor([box(axes, place - 0.5, place + 1.5)])
        offset = torch.zeros(1, axes, *[1] * axes, requires_grad=True)
        output = dk.deform_roi_pool(input, rois, offset, output_size=1, sampling_ratio=1, gamma=1.0)
        corner = (0, slice(None), *[0 if place < 0 else -1] * axes)
        assert_equal(output.flatten(), input[corner])
        output.sum().backward()
        assert offset.grad is not None and not offset.grad.any()


def test_on_a_grid_line_the_derivative_is_to_the_right(axes: int) -> None:
    for axis in range(axes):
        x_first = axes - 1 - axis
        input = (torch.arange(5.0) ** 2).reshape(1, 1, *[5 if a == axis else 1 for a in range(axes)])
        for place, slope in ((0.0, 1.0), (1.0, 3.0), (3.0, 7.0), (4.0, 0.0)):
            rois = torch.tensor([box(axes, 0.0, 1.0)])
            rois[0, 1 + x_first], rois[0, 1 + axes + x_first] = place, place + 1
            offset = torch.zeros(1, axes, *[1] * axes, requires_grad=True)
            output = dk.deform_roi_pool(input, rois, offset, output_size=1, sampling_ratio=1, gamma=1.0)
            output.sum().backward()
            assert output.item() == place**2
            assert offset.grad is not None
            assert offset.grad.flatten().tolist() == [slope if a == x_first else 0.0 for a in range(axes)]


# Empty, inverted and huge


def test_an_empty_roi(axes: int) -> None:
    named = PLAIN[axes].arguments(torch.float64)
    named["rois"][0, 1:] = torch.tensor(box(axes, 2.25, 2.25))[1:]
    adaptive = results({**named, "sampling_ratio": 0})
    assert not adaptive["output"][0].any() and not adaptive["offset"][0].any() and adaptive["output"][1:].all()
    fixed = results(named)
    size = [2.25 - 0.5] * axes
    point = torch.tensor([[0.0, *(x + 0.5 for x in size), *(x + 0.5 for x in size)]], dtype=torch.float64)
    point[0, 0] = named["rois"][0, 0]
    single = dk.deform_roi_pool(named["input"], point, output_size=1, sampling_ratio=1)
    assert_close(fixed["output"][0], single[0].expand_as(fixed["output"][0]))
    assert not fixed["offset"][0].any()


@pytest.mark.parametrize("axis", [0, -1])
def test_an_inverted_roi_has_no_samples_of_its_own(axes: int, axis: int) -> None:
    """A RoI that is inverted along one axis. With a fixed ratio it is sampled backwards, which the laws test."""
    named = {**PLAIN[axes].arguments(), "sampling_ratio": 0}
    corners = named["rois"][0, 1:].view(2, axes)
    corners[:, axis] = corners[:, axis].flip(0).clone()
    found = results(named)
    assert not found["output"][0].any() and not found["offset"][0].any() and found["output"][1:].any()


def test_all_rois_without_samples(axes: int, dtype: torch.dtype) -> None:
    named = {**PLAIN[axes].arguments(dtype), "sampling_ratio": 0}
    named["rois"][:, 1 : 1 + axes], named["rois"][:, 1 + axes :] = 3.0, 2.0
    found = results(named)
    for name, value in found.items():
        assert value.dtype == dtype and not value.any(), name


def test_huge_rois_have_at_most_1024_samples() -> None:
    """Every second pixel is 1, so that the mean shows which pixels were read."""
    input = (torch.arange(5000) % 2 == 0).double().reshape(1, 1, -1)
    rois = torch.tensor([[0.0, 0.25, 1023.25], [0.0, 0.25, 1024.25], [0.0, 0.5, 4096.5]], dtype=torch.float64)
    found = dk.deform_roi_pool(input, rois, output_size=1).flatten()
    for row, samples in enumerate((1023, 1024, 1024)):
        alone = dk.deform_roi_pool(input, rois[row : row + 1], output_size=1, sampling_ratio=samples)
        assert_equal(found[row], alone.flatten()[0])
    assert found[2] == 1  # pixels 2, 6, 10 ... of the 4096, whose mean is 1/2


def test_a_huge_roi_is_mostly_outside() -> None:
    """A RoI far beyond the cap along one axis and nearly without length along the other."""
    input = torch.ones(1, 1, 6, 6)
    rois = torch.tensor([[0.0, -1e6, 2.0, 1e6, 3.0], [0.0, -1e30, 2.0, 1e30, 3.0], [0.0, -1530.0, 2.0, 1542.0, 3.0]])
    found = dk.deform_roi_pool(input, rois, output_size=1).flatten()
    assert found[:2].tolist() == [0.0, 0.0]
    inside = sum(-1 <= -1530.5 + 3 * (i + 0.5) <= 6 for i in range(1024))
    assert inside == 2 and found[2].item() == 2 / 1024


# NaN and infinity


def test_nan_offset_is_visible_and_local(axes: int) -> None:
    named = PLAIN[axes].arguments()
    clean = results(named)
    place = tuple(n - 1 for n in PLAIN[axes].output_size)
    named["offset"][(2, 0, *place)] = torch.nan
    marked = results(named)
    output = torch.zeros_like(clean["output"], dtype=torch.bool)
    output[(2, slice(None), *place)] = True
    offset = torch.zeros_like(clean["offset"], dtype=torch.bool)
    offset[(2, slice(None), *place)] = True
    nothing = torch.zeros_like(clean["input"], dtype=torch.bool)
    for name, where in {"output": output, "offset": offset, "input": nothing}.items():
        assert torch.equal(marked[name].isnan(), where), name
        if name != "input":
            assert_equal(marked[name][~where], clean[name][~where], name)


@ratios
@pytest.mark.parametrize("corner", [1, -1])
@pytest.mark.parametrize("with_offset", [False, True])
def test_nan_corner_is_visible_and_local(axes: int, ratio: int, corner: int, with_offset: bool) -> None:
    named = {**PLAIN[axes].arguments(), "sampling_ratio": ratio}
    if not with_offset:
        named["offset"] = None
    clean = results(named)
    named["rois"][1, corner] = torch.nan
    marked = results(named)
    rows = torch.tensor([False, True, False, False])
    assert marked["output"][rows].isnan().all() and not marked["input"].isnan().any()
    assert_equal(marked["output"][~rows], clean["output"][~rows])
    if with_offset:
        assert marked["offset"][rows].isnan().all()
        assert_equal(marked["offset"][~rows], clean["offset"][~rows])


def test_nan_corner_shows_beside_an_inverted_axis() -> None:
    rois = torch.tensor([[0.0, torch.nan, 4.0, 3.0, 2.0], [0.0, 1.0, 4.0, 3.0, torch.nan]])
    assert dk.deform_roi_pool(torch.ones(1, 1, 6, 6), rois, output_size=2).isnan().all()


@pytest.mark.parametrize("far", [torch.inf, -1e30, 40.0])
def test_nan_offset_shows_beside_a_far_axis(far: float) -> None:
    for undefined in (0, 1):
        offset = torch.full((1, 2, 1, 1), far)
        offset[0, undefined] = torch.nan
        offset.requires_grad_()
        rois = torch.tensor([[0.0, 1.0, 1.0, 4.0, 4.0]])
        output = dk.deform_roi_pool(torch.ones(1, 1, 6, 6), rois, offset, output_size=1, sampling_ratio=2)
        assert output.isnan().all()
        output.sum().backward()
        assert offset.grad is not None and offset.grad.isnan().all()


@ratios
def test_infinite_corners_are_outside_or_undefined(axes: int, ratio: int) -> None:
    """The result is never the value of a pixel."""
    input = torch.ones(1, 2, *[5] * axes)
    inf = torch.inf
    rows = [box(axes, 1.0, inf), box(axes, -inf, 3.0), box(axes, -inf, inf), box(axes, inf, inf), box(axes, inf, -inf)]
    found = dk.deform_roi_pool(input, torch.tensor(rows), output_size=2, sampling_ratio=ratio)
    assert not found[0].any()
    assert found[1:].isnan().all()


@pytest.mark.parametrize("far", [torch.inf, -torch.inf, 1e30, -1e30, 1e6, -1e6])
def test_a_bin_moved_far_away_is_zero(axes: int, far: float) -> None:
    named = PLAIN[axes].arguments()
    named["offset"][:, -1] = far
    for name, value in results(named).items():
        assert not value.any(), name


@pytest.mark.parametrize("call", [c for c in OURS if c.case.with_offset], ids=lambda c: c.case.name)
@pytest.mark.parametrize("specials", [random_calls.WILD, (*random_calls.WILD, torch.nan)], ids=["far", "far and nan"])
def test_special_offsets_agree_with_the_reference(call: Call, specials: tuple[float, ...]) -> None:
    args = call.arguments()
    values = torch.tensor(specials)[torch.randint(len(specials), args[2].shape)]
    args[2] = torch.where(torch.rand(args[2].shape) < 0.3, values, args[2])
    check(call, args)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_leaks_from_outside_a_cell(axes: int, poison: float) -> None:
    """Poison on the edges, in the other images and beyond the cell of every sample has no effect."""
    input = torch.full((3, 2, *[6] * axes), poison)
    inner = torch.randn(2, *[2] * axes)
    input[(1, slice(None), *[slice(2, 4)] * axes)] = inner
    offset = torch.zeros(2, axes, *[1] * axes)
    offset[1, 0] = -40.0  # far outside, where the edge's pixels would be the nearest
    rois = torch.tensor([box(axes, 2.75, 3.25, 1.0)] * 2)
    named = {"input": input, "rois": rois, "offset": offset, "output_size": 1, "sampling_ratio": 2, "gamma": 1.0}
    found = results(named)
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert found["output"][0].all() and not found["output"][1].any() and not found["offset"][1].any()


def test_the_last_row_of_an_image_does_not_see_the_next(axes: int) -> None:
    input = torch.full((2, 1, *[3] * axes), torch.inf)
    input[0] = 1.0
    rois = torch.tensor([box(axes, 2.5, 2.5), box(axes, 2.5, 3.5)])
    assert dk.deform_roi_pool(input, rois, output_size=2, sampling_ratio=1).flatten().tolist() == [1.0] * 2 * 2**axes


# Batches


@ratios
def test_no_rois(axes: int, ratio: int, dtype: torch.dtype) -> None:
    named = {**PLAIN[axes].arguments(dtype), "sampling_ratio": ratio}
    for batch in (2, 0):
        named.update(input=named["input"][:batch], rois=named["rois"][:0], offset=named["offset"][:0])
        found = results(named)
        assert found["output"].shape == (0, 4, *PLAIN[axes].output_size) and found["output"].dtype == dtype
        assert found["offset"].shape == named["offset"].shape
        assert_equal(found["input"], torch.zeros_like(named["input"]))


@pytest.mark.parametrize("rois", [1, 7, 13])
def test_any_number_of_rois(axes: int, rois: int) -> None:
    for case in (PLAIN[axes], Case("adaptive", 3, 5, (9, 8, 7)[:axes], 1, (2, 3, 1)[:axes], sampling_ratio=0)):
        call = Call(OURS[0].operator, Case(**{**case.__dict__, "rois": rois}))
        check(call, call.arguments())


# Memory


CRASH = """
for axes in (1, 2, 3):
    for dtype in (torch.float32, torch.bfloat16):
        for value in wild:
            for where in ("rois", "offset"):
                input = torch.randn(2, 16, *[5] * axes, dtype=dtype, requires_grad=True)
                rois = torch.rand(6, 1 + 2 * axes) * 5
                rois[:, 0] = torch.arange(6) % 2
                offset = torch.randn(6, axes, *[3] * axes, dtype=dtype)
                if where == "rois":
                    rois[:, 1:] = torch.where(torch.rand(6, 2 * axes) < 0.5, torch.tensor(value), rois[:, 1:])
                else:
                    offset = torch.where(torch.rand(offset.shape) < 0.5, torch.tensor(value).to(dtype), offset)
                offset.requires_grad_()
                dk.deform_roi_pool(input, rois, offset, output_size=3, sampling_ratio=2).sum().backward()
                if axes == 1:
                    dk.deform_roi_pool(input, rois, offset, output_size=3).sum().backward()
"""


def test_wild_corners_and_offsets_do_not_crash() -> None:
    check_survives(CRASH)


# Sums of many samples


@pytest.mark.parametrize("ratio", [17, 40], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (400, 400)], ids=["dense", "sparse"])
def test_mean_of_a_constant_does_not_drift(ratio: int, size: tuple[int, int]) -> None:
    rois = torch.tensor([[0.0, 3.3, 4.1, 50.7, 61.2], [0.0, 1.2, 7.5, 33.1, 60.9]])
    output = dk.deform_roi_pool(torch.ones(1, 9, *size), rois, output_size=(2, 3), sampling_ratio=ratio)
    assert_close(output, torch.ones(2, 9, 2, 3, dtype=torch.float64))
    assert (output - 1).abs().max() <= 8 * torch.finfo(torch.float32).eps, "samples are added up one by one"


def test_infinity_in_a_mean_of_many_samples() -> None:
    input = torch.ones(1, 2, 64, 64)
    input[0, 1, 20, 20] = torch.inf
    output = dk.deform_roi_pool(input, torch.tensor([[0.0, 3.0, 3.0, 60.0, 60.0]]), output_size=1, sampling_ratio=40)
    assert output[0, 0].isfinite().all() and output[0, 1].isposinf().all()
