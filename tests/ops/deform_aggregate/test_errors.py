"""Every wrong argument of deformable aggregation, and the message that it gets."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit.ops._operator import operators
from deformkit.ops.deform_aggregate.cases import Case

CASE = Case("2d", 2, (7, 9), 4, 8, (3, 5), padding=1)  # an output of 7x7


def no(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# the name of a test: the change of a valid call, the error, and its message
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"value": [1.0]}, TypeError, "value is a list; it must be a torch.Tensor"),
    "no offset": ({"offset": None}, TypeError, "offset is a NoneType; it must be a torch.Tensor"),
    "no weight": ({"weight": 1.0}, TypeError, "weight is a float; it must be a torch.Tensor"),
    "integer value": (
        {"value": no(2, 7, 9, 4, 8, dtype=torch.int32)},
        TypeError,
        "value has dtype torch.int32; it must be float16, bfloat16, float32 or float64",
    ),
    "8-bit value": ({"value": no(2, 7, 9, 4, 8).to(torch.float8_e5m2)}, TypeError, "value has dtype torch.float8_e5m2"),
    "float64 offset": (
        {"offset": no(2, 7, 7, 4, 15, 2, dtype=torch.float64)},
        TypeError,
        "offset has dtype torch.float64; with a value of torch.float32 it must be torch.float32 or a half dtype",
    ),
    "float32 offset of float64": (
        {"value": no(2, 7, 9, 4, 8, dtype=torch.float64), "weight": no(2, 7, 7, 4, 15, dtype=torch.float64)},
        TypeError,
        "offset has dtype torch.float32; with a value of torch.float64 it must be torch.float64",
    ),
    "integer offset": (
        {"offset": no(2, 7, 7, 4, 15, 2, dtype=torch.int64)},
        TypeError,
        "offset has dtype torch.int64;",
    ),
    "half weight": (
        {"weight": no(2, 7, 7, 4, 15, dtype=torch.float16)},
        TypeError,
        "weight has dtype torch.float16; it must be torch.float32, as value's",
    ),
    "offset elsewhere": (
        {"offset": no(2, 7, 7, 4, 15, 2, device="meta")},
        ValueError,
        "offset is on meta; it must be on cpu, as value is",
    ),
    "weight elsewhere": ({"weight": no(2, 7, 7, 4, 15, device="meta")}, ValueError, "weight is on meta; it must be on"),
    "scalar offset": (
        {"offset": no()},
        ValueError,
        "offset has shape []; its last axis, of coordinates, must be 1, 2 or 3 long",
    ),
    "four coordinates": (
        {"offset": no(2, 7, 7, 4, 15, 4)},
        ValueError,
        "offset has shape [2, 7, 7, 4, 15, 4]; its last axis, of coordinates, must be 1, 2 or 3 long",
    ),
    "value without heads": (
        {"value": no(2, 7, 9, 32)},
        ValueError,
        "value has shape [2, 7, 9, 32]; with 2 coordinates in offset it must have 5 axes",
    ),
    "offset without heads": (
        {"offset": no(2, 7, 7, 60, 2)},
        ValueError,
        "offset has shape [2, 7, 7, 60, 2]; with 2 coordinates in offset it must have 6 axes",
    ),
    "weight without heads": ({"weight": no(2, 7, 7, 60)}, ValueError, "weight has shape [2, 7, 7, 60]; with 2 "),
    "no heads": ({"value": no(2, 7, 9, 0, 8)}, ValueError, "value has 0 heads of 8 channels; there must be at least"),
    "no channels": ({"value": no(2, 7, 9, 4, 0)}, ValueError, "value has 4 heads of 0 channels; "),
    "empty value": ({"value": no(2, 7, 0, 4, 8)}, ValueError, "value has spatial size 7x0; every axis"),
    "output too small": (
        {"dilation": 5},
        ValueError,
        "output size is -1x-9, from value 7x9, kernel 3x5, stride 1x1, padding 1x1, dilation 5x5; it must be at least",
    ),
    "batch of offset": ({"offset": no(1, 7, 7, 4, 15, 2)}, ValueError, "offset has batch size 1; value has 2"),
    "batch of weight": ({"weight": no(3, 7, 7, 4, 15)}, ValueError, "weight has batch size 3; value has 2"),
    "size of offset": (
        {"offset": no(2, 7, 9, 4, 15, 2)},
        ValueError,
        "offset has spatial size 7x9; the output has 7x7",
    ),
    "size of weight": ({"weight": no(2, 1, 1, 4, 15)}, ValueError, "weight has spatial size 1x1; the output has 7x7"),
    "heads of offset": ({"offset": no(2, 7, 7, 1, 15, 2)}, ValueError, "offset has 1 heads; value has 4"),
    "heads of weight": ({"weight": no(2, 7, 7, 8, 15)}, ValueError, "weight has 8 heads; value has 4"),
    "taps of offset": ({"offset": no(2, 7, 7, 4, 9, 2)}, ValueError, "offset has 9 taps; a 3x5 kernel has 15"),
    "taps of weight": ({"weight": no(2, 7, 7, 4, 14)}, ValueError, "weight has 14 taps; a 3x5 kernel has 15"),
    "all taps but no centre": (
        {"remove_center": True},
        ValueError,
        "offset has 15 taps; a 3x5 kernel without its centre has 14",
    ),
    "no centre to remove": (
        {"remove_center": True, "kernel_size": [3, 4]},
        ValueError,
        "kernel_size is 3x4; with remove_center every one must be odd",
    ),
    "no tap but the centre": (
        {"remove_center": True, "kernel_size": [1, 1]},
        ValueError,
        "kernel_size is 1x1; with remove_center no tap is left",
    ),
    "boundary": ({"boundary": "wrap"}, ValueError, 'boundary is \'wrap\'; it must be "zeros" or "border" or "reflect"'),
    "kernel size 0": ({"kernel_size": 0}, ValueError, "kernel_size is 0; each value must be at least 1"),
    "stride 0": ({"stride": 0}, ValueError, "stride is 0; each value must be at least 1"),
    "dilation 0": ({"dilation": (1, 0)}, ValueError, "dilation is (1, 0); each value must be at least 1"),
    "negative padding": ({"padding": -1}, ValueError, "padding is -1; each value must be at least 0"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, "stride is (1, 1, 1); it needs 2 values"),
    "real kernel size": ({"kernel_size": 3.0}, TypeError, "kernel_size is 3.0; it must be an int or a sequence of 2"),
    "padding by name": ({"padding": "same"}, TypeError, "padding is 'same'; it must be an int or a sequence of 2 ints"),
}

# Arguments that the schema of the operator refuses or converts, or that a kernel accepts.
WRONG_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale by name": ({"offset_scale": "2"}, TypeError, "offset_scale is '2'; it must be a real number"),
    "true scale": ({"offset_scale": True}, TypeError, "offset_scale is True; it must be a real number"),
    "tensor scale": ({"offset_scale": torch.ones(1)}, TypeError, "offset_scale is tensor([1.]); it must be a real"),
    "nan scale": ({"offset_scale": float("nan")}, ValueError, "offset_scale is nan; it must be finite"),
    "infinite scale": ({"offset_scale": float("-inf")}, ValueError, "offset_scale is -inf; it must be finite"),
    "numeric remove_center": ({"remove_center": 1}, TypeError, "remove_center is 1; it must be True or False"),
}


def test_the_call_is_sound_without_a_change() -> None:
    assert dk.deform_aggregate(**CASE.arguments()).shape == (2, 7, 7, 4, 8)


@pytest.mark.parametrize("name", [*WRONG, *WRONG_OPTIONS])
def test_a_wrong_argument_is_named(name: str) -> None:
    change, error, message = {**WRONG, **WRONG_OPTIONS}[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        dk.deform_aggregate(**{**CASE.arguments(), **change})


@pytest.mark.parametrize("name", [name for name in WRONG if name != "boundary"])
def test_the_bare_operator_raises_an_error_too(name: str) -> None:
    """Wrong arguments of torch.ops.deformkit raise an error and never lead to an access out of bounds."""
    change, _, _ = WRONG[name]
    named = {**CASE.arguments(), **change}
    for step in ("kernel_size", "stride", "padding", "dilation"):
        if isinstance(named[step], int):
            named[step] = [named[step]] * 2
    args = operators["deform_aggregate"].ordered(named)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.deformkit.deform_aggregate(*args)
    if name.endswith("elsewhere"):  # nothing is computed for a tensor on meta
        return
    grad_output = torch.zeros(2, 7, 7, 4, 8)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.deformkit.deform_aggregate_backward(grad_output, *args, [True] * 3)


@pytest.mark.parametrize("boundary", [-1, 3, 2**40, "zeros"])
def test_an_unknown_code_raises(boundary: Any) -> None:
    args = operators["deform_aggregate"].ordered(CASE.arguments())
    args[operators["deform_aggregate"].arguments.index("boundary")] = boundary
    with pytest.raises((RuntimeError, ValueError), match="boundary"):
        torch.ops.deformkit.deform_aggregate(*args)


@pytest.mark.parametrize(
    "grad", [no(2, 7, 9, 4, 8), no(1, 7, 7, 4, 8), no(2, 7, 7, 8, 4), no(6), no(2, 7, 7, 4, 8).double()]
)
def test_a_wrong_cotangent_raises(grad: Tensor) -> None:
    args = operators["deform_aggregate"].ordered(CASE.arguments())
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.deformkit.deform_aggregate_backward(grad, *args, [True] * 3)


@pytest.mark.parametrize("mask", [[], [True], [True] * 4])
def test_a_wrong_output_mask_raises(mask: list[bool]) -> None:
    args = operators["deform_aggregate"].ordered(CASE.arguments())
    with pytest.raises(RuntimeError, match="output_mask"):
        torch.ops.deformkit.deform_aggregate_backward(torch.zeros(2, 7, 7, 4, 8), *args, mask)


def test_fake_tensors_are_checked_too() -> None:
    """Arguments that would fail at run time fail while a graph is traced."""
    named = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in CASE.arguments().items()}
    named["offset"] = no(2, 7, 9, 4, 15, 2, device="meta")
    with pytest.raises(ValueError, match="offset has spatial size 7x9"):
        operators["deform_aggregate"](*operators["deform_aggregate"].ordered(named))


def test_steps_in_every_form() -> None:
    named = Case("2d", 2, (7, 9), 4, 8, (1, 1), padding=1).arguments()
    expected = dk.deform_aggregate(**named)
    for one in (1, [1], (1,), (1, 1), torch.Size([1, 1])):
        named.update(kernel_size=one, stride=one, padding=one, dilation=one, offset_scale=1)
        assert torch.equal(dk.deform_aggregate(**named), expected)
