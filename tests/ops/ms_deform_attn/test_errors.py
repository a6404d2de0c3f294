"""Every wrong argument of multi-scale deformable attention, and the message that it gets."""

import re
from typing import Any

import pytest
import torch
from rooms import needs_kernel
from torch import Tensor

import deformkit as dk
from deformkit.ops import _suspect
from deformkit.ops._operator import operators

OPERATOR = operators["ms_deform_attn"]


def no(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def sound(**changes: Any) -> dict[str, Any]:
    """Two levels of an image, two samples, five queries, three heads, four points on each level."""
    named = {
        "value": no(2, 4 * 5 + 2 * 3, 3, 8),
        "spatial_shapes": [(4, 5), (2, 3)],
        "sampling_locations": no(2, 5, 3, 2, 4, 2),
        "attention_weights": no(2, 5, 3, 2, 4),
    }
    return {**named, **changes}


FLAT = {"sampling_locations": no(2, 5, 3, 7, 2), "attention_weights": no(2, 5, 3, 7), "num_points": [4, 3]}

# the name of a test: the change of a valid call, the error, and its message
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"value": [1.0]}, TypeError, "value is a list; it must be a torch.Tensor"),
    "no locations": ({"sampling_locations": None}, TypeError, "sampling_locations is a NoneType; it must be a torch"),
    "no weights": ({"attention_weights": 1.0}, TypeError, "attention_weights is a float; it must be a torch.Tensor"),
    "integer value": (
        {"value": no(2, 26, 3, 8, dtype=torch.int32)},
        TypeError,
        "value has dtype torch.int32; it must be float16, bfloat16, float32 or float64",
    ),
    "half locations": (
        {"sampling_locations": no(2, 5, 3, 2, 4, 2, dtype=torch.float16)},
        TypeError,
        "sampling_locations has dtype torch.float16; it must be torch.float32: in half precision a location may be off "
        "by more than a pixel; compute it in float32, or give sampling_locations.float()",
    ),
    "half locations beside a half value": (
        {
            "value": no(2, 26, 3, 8, dtype=torch.bfloat16),
            "sampling_locations": no(2, 5, 3, 2, 4, 2, dtype=torch.bfloat16),
            "attention_weights": no(2, 5, 3, 2, 4, dtype=torch.bfloat16),
        },
        TypeError,
        "sampling_locations has dtype torch.bfloat16; it must be torch.float32: in half precision",
    ),
    "double locations": (
        {"sampling_locations": no(2, 5, 3, 2, 4, 2, dtype=torch.float64)},
        TypeError,
        "sampling_locations has dtype torch.float64; with a value of torch.float32 it must be torch.float32",
    ),
    "single locations of a double value": (
        {"value": no(2, 26, 3, 8, dtype=torch.float64), "attention_weights": no(2, 5, 3, 2, 4, dtype=torch.float64)},
        TypeError,
        "sampling_locations has dtype torch.float32; with a value of torch.float64 it must be torch.float64",
    ),
    "integer locations": (
        {"sampling_locations": no(2, 5, 3, 2, 4, 2, dtype=torch.int64)},
        TypeError,
        "sampling_locations has dtype torch.int64; with a value of torch.float32 it must be torch.float32",
    ),
    "half weights": (
        {"attention_weights": no(2, 5, 3, 2, 4, dtype=torch.float16)},
        TypeError,
        "attention_weights has dtype torch.float16; it must be torch.float32, as value's",
    ),
    "single weights of a half value": (
        {"value": no(2, 26, 3, 8, dtype=torch.float16)},
        TypeError,
        "attention_weights has dtype torch.float32; it must be torch.float16, as value's",
    ),
    "locations elsewhere": (
        {"sampling_locations": no(2, 5, 3, 2, 4, 2, device="meta")},
        ValueError,
        "sampling_locations is on meta; it must be on cpu, as value is",
    ),
    "weights elsewhere": (
        {"attention_weights": no(2, 5, 3, 2, 4, device="meta")},
        ValueError,
        "attention_weights is on meta; it must be on cpu, as value is",
    ),
    "axes of value": ({"value": no(2, 26, 24)}, ValueError, "value has shape [2, 26, 24]; it must have 4 axes"),
    "axes of locations": (
        {"sampling_locations": no(2, 5, 3, 2)},
        ValueError,
        "sampling_locations has shape [2, 5, 3, 2]; it must be [B, Q, H, L, P, N] or [B, Q, H, P, N] with 1, 2 or 3",
    ),
    "coordinates": (
        {"sampling_locations": no(2, 5, 3, 2, 4, 4)},
        ValueError,
        "sampling_locations has shape [2, 5, 3, 2, 4, 4]; it must be [B, Q, H, L, P, N] or [B, Q, H, P, N] with 1, 2 ",
    ),
    "shape of weights": (
        {"attention_weights": no(2, 5, 3, 2, 3)},
        ValueError,
        "attention_weights has shape [2, 5, 3, 2, 3]; with sampling_locations of shape [2, 5, 3, 2, 4, 2] it must be "
        "[2, 5, 3, 2, 4]",
    ),
    "flat weights": (
        {"attention_weights": no(2, 5, 3, 8)},
        ValueError,
        "attention_weights has shape [2, 5, 3, 8]; with sampling_locations of shape [2, 5, 3, 2, 4, 2] it must be ",
    ),
    "no heads": (
        {
            "value": no(2, 26, 0, 8),
            "sampling_locations": no(2, 5, 0, 2, 4, 2),
            "attention_weights": no(2, 5, 0, 2, 4),
        },
        ValueError,
        "value has shape [2, 26, 0, 8]; heads and channels must be at least 1",
    ),
    "no channels": ({"value": no(2, 26, 3, 0)}, ValueError, "value has shape [2, 26, 3, 0]; heads and channels must"),
    "batch": ({"value": no(1, 26, 3, 8)}, ValueError, "sampling_locations has batch size 2; value has 1"),
    "heads": ({"value": no(2, 26, 6, 8)}, ValueError, "sampling_locations has 3 heads; value has 6"),
    "sum": (
        {"spatial_shapes": [(4, 5), (2, 2)]},
        ValueError,
        "spatial_shapes adds up to 24 = 4x5 + 2x2 positions; value has 26",
    ),
    "columns": (
        {"spatial_shapes": [(4, 5, 1), (2, 3, 1)]},
        ValueError,
        "spatial_shapes has 3 columns; sampling_locations has 2 coordinates",
    ),
    "columns of a tensor": (
        {"spatial_shapes": torch.ones(2, 3, dtype=torch.int64)},
        ValueError,
        "spatial_shapes has 3 columns; sampling_locations has 2 coordinates",
    ),
    "one ragged row": (
        {"spatial_shapes": [(4, 5), (6,)]},
        ValueError,
        "spatial_shapes has 1 columns; sampling_locations has 2 coordinates",
    ),
    "ints for images": (
        {"spatial_shapes": [4, 5, 2, 3]},
        TypeError,
        "spatial_shapes is [4, 5, 2, 3]; it must be a sequence of tuples of 2 ints",
    ),
    "one tuple for a sequence": (
        {
            "spatial_shapes": [(13, 1), (13, 1)],
            "sampling_locations": no(2, 5, 3, 2, 4, 1),
        },
        ValueError,
        "spatial_shapes has 2 columns; sampling_locations has 1 coordinates",
    ),
    "real sizes": (
        {"spatial_shapes": [(4.0, 5.0), (2.0, 3.0)]},
        TypeError,
        "spatial_shapes is [(4.0, 5.0), (2.0, 3.0)]; it must be a sequence of tuples of 2 ints",
    ),
    "no shapes": ({"spatial_shapes": 5}, TypeError, "spatial_shapes is 5; it must be a sequence of tuples of 2 ints"),
    "real tensor of shapes": (
        {"spatial_shapes": torch.ones(2, 2)},
        TypeError,
        "spatial_shapes has dtype torch.float32; it must be an integer dtype",
    ),
    "empty shapes": ({"spatial_shapes": []}, ValueError, "spatial_shapes is empty; it needs at least one level"),
    "size 0": (
        {"spatial_shapes": [(26, 1), (0, 3)]},
        ValueError,
        "spatial_shapes has a level of size 0x3; every size must be at least 1",
    ),
    "negative sizes": (
        {"spatial_shapes": [(4, 5), (-2, -3)]},
        ValueError,
        "spatial_shapes has a level of size -2x-3; every size must be at least 1",
    ),
    "levels": ({"spatial_shapes": [(26, 1)]}, ValueError, "sampling_locations has 2 levels; spatial_shapes has 1"),
    "no points": (
        {"sampling_locations": no(2, 5, 3, 2, 0, 2), "attention_weights": no(2, 5, 3, 2, 0)},
        ValueError,
        "num_points is [0, 0]; each must be at least 0 and their sum at least 1",
    ),
    "num_points and a level axis": (
        {"num_points": [4, 4]},
        ValueError,
        "num_points is [4, 4]; it must be None with sampling_locations [B, Q, H, L, P, N]",
    ),
    "no num_points": (
        {**FLAT, "num_points": None},
        ValueError,
        "num_points is None; with sampling_locations [B, Q, H, P, N] and 2 levels it must say how many of the P points "
        "belong to each level",
    ),
    "num_points of another sum": (
        {**FLAT, "num_points": [4, 4]},
        ValueError,
        "num_points is [4, 4], 8 in all; sampling_locations has 7 points",
    ),
    "one number of points": (
        {**FLAT, "num_points": 4},
        ValueError,
        "num_points is [4, 4], 8 in all; sampling_locations has 7 points",
    ),
    "levels of num_points": (
        {**FLAT, "num_points": [7]},
        ValueError,
        "num_points is [7], for 1 levels; spatial_shapes has 2",
    ),
    "negative num_points": (
        {**FLAT, "num_points": [8, -1]},
        ValueError,
        "num_points is [8, -1]; each must be at least 0 and their sum at least 1",
    ),
    "real num_points": (
        {**FLAT, "num_points": [4.0, 3.0]},
        TypeError,
        "num_points is [4.0, 3.0]; it must be an int or a sequence of ints",
    ),
    "mode": ({"mode": "discrete"}, ValueError, 'mode is \'discrete\'; it must be "linear" or "nearest"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        dk.ms_deform_attn(**sound(**change))


def test_the_unchanged_call_is_valid() -> None:
    assert dk.ms_deform_attn(**sound()).shape == dk.ms_deform_attn(**sound(**FLAT)).shape == (2, 5, 24)


# The same for the operator: the change of a valid call.
BARE: dict[str, dict[str, Any]] = {
    "integer value": {"value": no(2, 26, 3, 8, dtype=torch.int32)},
    "half locations": {"sampling_locations": no(2, 5, 3, 7, 2, dtype=torch.float16)},
    "double locations": {"sampling_locations": no(2, 5, 3, 7, 2, dtype=torch.float64)},
    "half weights": {"attention_weights": no(2, 5, 3, 7, dtype=torch.float16)},
    "axes of value": {"value": no(2, 26, 24)},
    "axes of locations": {"sampling_locations": no(2, 5, 3, 7)},
    "axes of weights": {"attention_weights": no(2, 5, 3, 7, 1)},
    "coordinates": {"sampling_locations": no(2, 5, 3, 7, 3)},
    "batch of value": {"value": no(1, 26, 3, 8)},
    "batch of locations": {"sampling_locations": no(3, 5, 3, 7, 2)},
    "batch of weights": {"attention_weights": no(1, 5, 3, 7)},
    "queries": {"attention_weights": no(2, 6, 3, 7)},
    "heads of value": {"value": no(2, 26, 6, 8)},
    "heads of weights": {"attention_weights": no(2, 5, 1, 7)},
    "points of weights": {"attention_weights": no(2, 5, 3, 1)},
    "no channels": {"value": no(2, 26, 3, 0)},
    "sum above": {"spatial_shapes": [4, 5, 2, 4]},
    "sum below": {"spatial_shapes": [4, 5, 2, 2]},
    "no shapes": {"spatial_shapes": []},
    "odd number of sizes": {"spatial_shapes": [4, 5, 6]},
    "size 0": {"spatial_shapes": [26, 1, 0, 3]},
    "negative sizes": {"spatial_shapes": [4, 5, -2, -3]},
    "sizes that overflow": {"spatial_shapes": [2**33, 2**31, 2, 13]},
    "points above": {"num_points": [4, 4]},
    "points below": {"num_points": [4, 2]},
    "negative points": {"num_points": [8, -1]},
    "levels of points": {"num_points": [7]},
    "mode": {"mode": 2},
    "negative mode": {"mode": -1},
    "mode by name": {"mode": "linear"},
}


def bare(**changes: Any) -> list[Any]:
    named = {**sound(**FLAT, spatial_shapes=[4, 5, 2, 3], mode=0), **changes}
    return [named[name] for name in OPERATOR.arguments]


@pytest.mark.parametrize("name", [name for name in BARE if name != "mode by name"])
def test_fake_tensors_are_checked(name: str) -> None:
    """Arguments that would fail at run time fail while a graph is traced."""
    args = [v.to("meta") if isinstance(v, Tensor) else v for v in bare(**BARE[name])]
    with pytest.raises((ValueError, TypeError), match=r" (has|is|adds up) "):
        torch.ops.deformkit.ms_deform_attn(*args)


@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("name", BARE)
def test_the_bare_operator_raises_an_error_too(name: str) -> None:
    """Wrong arguments of torch.ops.deformkit raise an error and never lead to an access out of bounds."""
    args = bare(**BARE[name])
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.deformkit.ms_deform_attn(*args)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.deformkit.ms_deform_attn_backward(no(2, 5, 24), *args, [True] * 3)


@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("grad", [no(2, 5, 23), no(1, 5, 24), no(2, 6, 24), no(24), no(2, 5, 24).double()])
def test_a_wrong_cotangent_raises(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.deformkit.ms_deform_attn_backward(grad, *bare(), [True] * 3)


@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("mask", [[], [True], [True] * 4])
def test_a_wrong_output_mask_raises(mask: list[bool]) -> None:
    with pytest.raises(RuntimeError, match="output_mask"):
        torch.ops.deformkit.ms_deform_attn_backward(no(2, 5, 24), *bare(), mask)


PIXELS = torch.rand(2, 100, 2, 1, 4, 2) * torch.tensor([30.0, 20.0])
WRONG_UNITS = {
    "pixels": (PIXELS, "sampling_locations lie farther outside their level than it is long.* are these pixels?"),
    "-1 to 1": (torch.rand(2, 100, 2, 1, 4, 2) * 2 - 1, "coordinates in sampling_locations are negative.* grid_sample"),
}


@pytest.mark.parametrize("units", WRONG_UNITS)
def test_locations_in_other_units_warn_once(monkeypatch: pytest.MonkeyPatch, units: str) -> None:
    locations, message = WRONG_UNITS[units]
    monkeypatch.setitem(_suspect.looks_left, "locations", 3)
    value, weights = torch.randn(2, 600, 2, 3), torch.ones(2, 100, 2, 1, 4)
    dk.ms_deform_attn(value, [(20, 30)], torch.rand_like(locations) * 1.2 - 0.1, weights)
    with pytest.warns(UserWarning, match=message) as caught:
        dk.ms_deform_attn(value, [(20, 30)], locations, weights)
    assert len(caught) == 1 and caught[0].filename == __file__
    _suspect.given.clear()
    for _ in range(2):
        dk.ms_deform_attn(value, [(20, 30)], torch.rand_like(locations), weights)
    assert _suspect.looks_left["locations"] == 0
    dk.ms_deform_attn(value, [(20, 30)], locations, weights)  # no further values are read, and nothing is said
