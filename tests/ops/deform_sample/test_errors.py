"""Every wrong argument of deformable sampling, with what is said about it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit.ops._operator import operators
from deformkit.ops.deform_sample.cases import Case

OPERATOR = operators["deform_sample"]
CASE = Case("2d", 2, 4, (7, 9), (5, 3), groups=2)


def no(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# name of the test: what is changed in a sound call, the error, what its message says
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"input": [1.0]}, TypeError, "input is a list; it must be a torch.Tensor"),
    "no points": ({"points": None}, TypeError, "points is a NoneType; it must be a torch.Tensor"),
    "integer input": (
        {"input": no(2, 4, 7, 9, dtype=torch.int32)},
        TypeError,
        "input has dtype torch.int32; it must be float16, bfloat16, float32 or float64",
    ),
    "half points": (
        {"points": no(2, 2, 15, 2, dtype=torch.float16)},
        TypeError,
        "points has dtype torch.float16; it must be torch.float32: in half precision a location may be off by more "
        "than a pixel; compute it in float32, or give points.float()",
    ),
    "float64 points": (
        {"points": no(2, 2, 15, 2, dtype=torch.float64)},
        TypeError,
        "points has dtype torch.float64; with an input of torch.float32 it must be torch.float32",
    ),
    "float32 points of float64": (
        {"input": no(2, 4, 7, 9, dtype=torch.float64)},
        TypeError,
        "points has dtype torch.float32; with an input of torch.float64 it must be torch.float64",
    ),
    "points elsewhere": (
        {"points": no(2, 2, 15, 2, device="meta")},
        ValueError,
        "points is on meta; it must be on cpu, as input is",
    ),
    "input without axes": (
        {"input": no(2, 4)},
        ValueError,
        "input has shape [2, 4]; it needs a batch, channels and 1, 2 or 3 spatial axes",
    ),
    "four axes": ({"input": no(2, 4, 1, 1, 1, 1)}, ValueError, "input has shape [2, 4, 1, 1, 1, 1]; it needs"),
    "empty input": ({"input": no(2, 4, 7, 0)}, ValueError, "input has spatial size 7x0; every axis must have at least"),
    "points of a volume": (
        {"points": no(2, 2, 15, 3)},
        ValueError,
        "points has shape [2, 2, 15, 3]; with 2 spatial axes in input it must be [B, G, *out, 2]",
    ),
    "points without groups": ({"points": no(2, 2)}, ValueError, "points has shape [2, 2]; with 2 spatial axes in"),
    "batch of points": ({"points": no(1, 2, 15, 2)}, ValueError, "points has batch size 1; input has 2"),
    "empty batch of input": ({"input": no(0, 4, 7, 9)}, ValueError, "points has batch size 2; input has 0"),
    "three groups": (
        {"points": no(2, 3, 15, 2)},
        ValueError,
        "points has 3 groups and input 4 channels; the channels must be a multiple of the groups",
    ),
    "no groups": ({"points": no(2, 0, 15, 2)}, ValueError, "points has 0 groups and input 4 channels; "),
    "no channels": ({"input": no(2, 0, 7, 9)}, ValueError, "points has 2 groups and input 0 channels; "),
    "boundary": (
        {"boundary": "wrap"},
        ValueError,
        'boundary is \'wrap\'; it must be "zeros" or "border" or "reflect"',
    ),
    "mode": ({"mode": "cubic"}, ValueError, 'mode is \'cubic\'; it must be "linear" or "nearest"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        dk.deform_sample(**{**CASE.arguments(), **change})


@pytest.mark.parametrize("name", [name for name in WRONG if name not in ("boundary", "mode")])
def test_the_bare_operator_raises_an_error_too(name: str) -> None:
    """torch.ops.deformkit called with what the public function would refuse: an error, never memory out of bounds."""
    args = OPERATOR.ordered({**CASE.arguments(), **WRONG[name][0]})
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.deformkit.deform_sample(*args)
    if name.endswith("elsewhere"):  # with a tensor on meta nothing is computed
        return
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.deformkit.deform_sample_backward(no(2, 4, 5, 3), *args, [True] * 2)


@pytest.mark.parametrize(("argument", "code"), [("boundary", 3), ("boundary", -1), ("mode", 2), ("mode", 2**40)])
def test_an_unknown_code_raises(argument: str, code: int) -> None:
    args = OPERATOR.ordered(CASE.arguments())
    args[OPERATOR.arguments.index(argument)] = code
    with pytest.raises((RuntimeError, ValueError), match=argument):
        torch.ops.deformkit.deform_sample(*args)


@pytest.mark.parametrize(
    "grad",
    [no(2, 4, 5, 2), no(1, 4, 5, 3), no(2, 4, 3, 5), no(2, 4, 15), no(6), no(2, 4, 5, 3).double()],
)
def test_a_wrong_cotangent_raises(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.deformkit.deform_sample_backward(grad, *OPERATOR.ordered(CASE.arguments()), [True] * 2)


@pytest.mark.parametrize("mask", [[], [True], [True] * 3])
def test_a_wrong_output_mask_raises(mask: list[bool]) -> None:
    with pytest.raises(RuntimeError, match="output_mask"):
        torch.ops.deformkit.deform_sample_backward(no(2, 4, 5, 3), *OPERATOR.ordered(CASE.arguments()), mask)
