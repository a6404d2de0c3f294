"""Every wrong argument of deformable convolution, and the message that it gets."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit.ops._operator import operators
from deformkit.ops.deform_conv.cases import Case

CASE = Case("2d", 2, 8, (7, 9), 6, (3, 2), padding=1, groups=2, offset_groups=2)


def no(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


# the name of a test: the change of a valid call, the error, and its message
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"input": [1.0]}, TypeError, "input is a list; it must be a torch.Tensor"),
    "no offset": ({"offset": None}, TypeError, "offset is a NoneType; it must be a torch.Tensor"),
    "integer input": (
        {"input": no(2, 8, 7, 9, dtype=torch.int32)},
        TypeError,
        "input has dtype torch.int32; it must be float16, bfloat16, float32 or float64",
    ),
    "complex input": ({"input": no(2, 8, 7, 9, dtype=torch.complex64)}, TypeError, "input has dtype torch.complex64; "),
    "8-bit input": ({"input": no(2, 8, 7, 9).to(torch.float8_e5m2)}, TypeError, "input has dtype torch.float8_e5m2; "),
    "8-bit offset": (
        {"offset": no(2, 24, 7, 10).to(torch.float8_e5m2)},
        TypeError,
        "offset has dtype torch.float8_e5m2",
    ),
    "float64 offset": (
        {"offset": no(2, 24, 7, 10, dtype=torch.float64)},
        TypeError,
        "offset has dtype torch.float64; ",
    ),
    "integer offset": ({"offset": no(2, 24, 7, 10, dtype=torch.int64)}, TypeError, "offset has dtype torch.int64; "),
    "half weight": (
        {"weight": no(6, 4, 3, 2, dtype=torch.float16)},
        TypeError,
        "weight has dtype torch.float16; it must be torch.float32, as input's",
    ),
    "half mask": ({"mask": no(2, 12, 7, 10, dtype=torch.float16)}, TypeError, "mask has dtype torch.float16; "),
    "half bias": ({"bias": no(6, dtype=torch.bfloat16)}, TypeError, "bias has dtype torch.bfloat16; "),
    "offset elsewhere": (
        {"offset": no(2, 24, 7, 10, device="meta")},
        ValueError,
        "offset is on meta; it must be on cpu, as input is",
    ),
    "weight elsewhere": ({"weight": no(6, 4, 3, 2, device="meta")}, ValueError, "weight is on meta; it must be on cpu"),
    "bias elsewhere": ({"bias": no(6, device="meta")}, ValueError, "bias is on meta; it must be on cpu"),
    "mask elsewhere": ({"mask": no(2, 12, 7, 10, device="meta")}, ValueError, "mask is on meta; it must be on cpu"),
    "unbatched input": (
        {"input": no(8, 7, 9)},
        ValueError,
        "input has shape [8, 7, 9]; a 2-D deformable convolution needs 4 axes",
    ),
    "flat weight": ({"weight": no(6, 4, 3)}, ValueError, "weight has shape [6, 4, 3]; a 2-D"),
    "two-dimensional bias": ({"bias": no(6, 1)}, ValueError, "bias has shape [6, 1]; "),
    "empty weight": ({"weight": no(0, 4, 3, 2)}, ValueError, "weight has shape [0, 4, 3, 2]; every axis"),
    "no channels": ({"input": no(2, 0, 7, 9)}, ValueError, "input has 0 channels; "),
    "channels of weight": (
        {"weight": no(6, 3, 3, 2)},
        ValueError,
        "input has 8 channels; weight needs a multiple of its 3 per group",
    ),
    "output channels": (
        {"weight": no(5, 4, 3, 2)},
        ValueError,
        "weight has 5 output channels; they must divide into 2 groups",
    ),
    "length of bias": ({"bias": no(5)}, ValueError, "bias has 5 elements; weight has 6 output channels"),
    "empty input": ({"input": no(2, 8, 0, 9)}, ValueError, "input has spatial size 0x9; every axis"),
    "output too small": (
        {"dilation": 5},
        ValueError,
        "output size is -1x6, from input 7x9, kernel 3x2, stride 1x1, padding 1x1, dilation 5x5; it must be at least 1",
    ),
    "channels of offset": (
        {"offset": no(2, 16, 7, 10)},
        ValueError,
        "offset has 16 channels; a 3x2 kernel needs a multiple of 12 = 6 taps x 2 coordinates",
    ),
    "no offset channels": ({"offset": no(2, 0, 7, 10)}, ValueError, "offset has 0 channels; "),
    "offset groups": (
        {"offset": no(2, 36, 7, 10)},
        ValueError,
        "offset has 36 channels, thus 3 offset groups; they must divide input's 8 channels",
    ),
    "batch of offset": ({"offset": no(1, 24, 7, 10)}, ValueError, "offset has batch size 1; input has 2"),
    "size of offset": ({"offset": no(2, 24, 7, 9)}, ValueError, "offset has spatial size 7x9; the output has 7x10"),
    "channels of mask": (
        {"mask": no(2, 6, 7, 10)},
        ValueError,
        "mask has 6 channels; a 3x2 kernel with 2 offset groups needs 12 = 2 groups x 6 taps",
    ),
    "batch of mask": ({"mask": no(3, 12, 7, 10)}, ValueError, "mask has batch size 3; input has 2"),
    "size of mask": ({"mask": no(2, 12, 1, 1)}, ValueError, "mask has spatial size 1x1; the output has 7x10"),
    "boundary": ({"boundary": "wrap"}, ValueError, 'boundary is \'wrap\'; it must be "zeros" or "border" or "reflect"'),
    "stride 0": ({"stride": 0}, ValueError, "stride is 0; each value must be at least 1"),
    "dilation 0": ({"dilation": (1, 0)}, ValueError, "dilation is (1, 0); each value must be at least 1"),
    "negative padding": ({"padding": -1}, ValueError, "padding is -1; each value must be at least 0"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, "stride is (1, 1, 1); it needs 2 values"),
    "real stride": ({"stride": 1.5}, TypeError, "stride is 1.5; it must be an int or a sequence of 2 ints"),
    "padding by name": ({"padding": "same"}, TypeError, "padding is 'same'; it must be an int or a sequence of 2 ints"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        dk.deform_conv2d(**{**CASE.arguments(), **change})


@pytest.mark.parametrize("name", [name for name in WRONG if name != "boundary"])
def test_the_bare_operator_raises_an_error_too(name: str) -> None:
    """Wrong arguments of torch.ops.deformkit raise an error and never lead to an access out of bounds."""
    change, _, _ = WRONG[name]
    named = {**CASE.arguments(), **change}
    for step in ("stride", "padding", "dilation"):
        if isinstance(named[step], int):
            named[step] = [named[step]] * 2
    args = operators["deform_conv"].ordered(named)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.deformkit.deform_conv(*args)
    if name.endswith("elsewhere"):  # nothing is computed for a tensor on meta
        return
    grad_output = torch.zeros(2, 6, 7, 10)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.deformkit.deform_conv_backward(grad_output, *args, [True] * 5)


@pytest.mark.parametrize("step", ["padding", "stride", "dilation"])
def test_a_step_beyond_int64_arithmetic_raises(step: str) -> None:
    args = operators["deform_conv"].ordered({**CASE.arguments(), step: [2**62, 1]})
    with pytest.raises(RuntimeError, match="must be at most 2\\^40"):
        torch.ops.deformkit.deform_conv(*args)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_the_bare_operator_names_what_has_a_wrong_dtype(name: str, dtype: torch.dtype) -> None:
    arguments = CASE.arguments()
    args = operators["deform_conv"].ordered({**arguments, name: arguments[name].to(dtype)})
    with pytest.raises(RuntimeError, match=f"{name} must have the dtype"):
        torch.ops.deformkit.deform_conv(*args)


@pytest.mark.parametrize("boundary", [-1, 3, 2**40, "zeros"])
def test_an_unknown_code_raises(boundary: Any) -> None:
    args = operators["deform_conv"].ordered(CASE.arguments())
    args[operators["deform_conv"].arguments.index("boundary")] = boundary
    with pytest.raises((RuntimeError, ValueError), match="boundary"):
        torch.ops.deformkit.deform_conv(*args)


@pytest.mark.parametrize("grad", [no(2, 6, 7, 9), no(1, 6, 7, 10), no(2, 5, 7, 10), no(6), no(2, 6, 7, 10).double()])
def test_a_wrong_cotangent_raises(grad: Tensor) -> None:
    args = operators["deform_conv"].ordered(CASE.arguments())
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.deformkit.deform_conv_backward(grad, *args, [True] * 5)


@pytest.mark.parametrize("mask", [[], [True], [True] * 6])
def test_a_wrong_output_mask_raises(mask: list[bool]) -> None:
    args = operators["deform_conv"].ordered(CASE.arguments())
    with pytest.raises(RuntimeError, match="output_mask"):
        torch.ops.deformkit.deform_conv_backward(torch.zeros(2, 6, 7, 10), *args, mask)


@pytest.mark.parametrize("dimensions", [(1, 2), (2, 3), (3, 1)])
def test_the_wrong_number_of_axes(dimensions: tuple[int, int]) -> None:
    function_axes, case_axes = dimensions
    function = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}[function_axes]
    named = Case("small", 1, 1, (4,) * case_axes, 1, (2,) * case_axes).arguments()
    named.update(stride=1, padding=0, dilation=1)
    with pytest.raises(ValueError, match=f"a {function_axes}-D deformable convolution needs {function_axes + 2} axes"):
        function(**named)


def test_fake_tensors_are_checked_too() -> None:
    """Arguments that would fail at run time fail while a graph is traced."""
    named = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in CASE.arguments().items()}
    named["offset"] = no(2, 24, 7, 9, device="meta")
    with pytest.raises(ValueError, match="offset has spatial size 7x9"):
        operators["deform_conv"](*operators["deform_conv"].ordered(named))


def test_steps_in_every_form() -> None:
    named = CASE.arguments()
    expected = dk.deform_conv2d(**named)
    for one in (1, [1], (1,), (1, 1), torch.Size([1, 1])):
        named.update(stride=one, padding=one, dilation=one)
        assert torch.equal(dk.deform_conv2d(**named), expected)


def test_an_offset_that_contains_a_mask_is_recognised() -> None:
    input, weight = torch.randn(1, 8, 5, 5), torch.randn(4, 8, 3, 3)
    for channels, groups in ((27, "1 group"), (81, "3 groups")):
        split = f"{channels} = {groups} x 9 taps x (2 coordinates + 1 mask): .* mask [:, {channels // 27 * 18}:]"
        pattern = re.escape(split).replace(r"\.\*", ".*")
        with pytest.raises(ValueError, match=f"offset has {channels} channels.*; {pattern}"):
            dk.deform_conv2d(input, torch.zeros(1, channels, 5, 5), weight, padding=1)


@pytest.mark.parametrize(
    ("padding", "hint"), [(0, "with padding=(1, 1) instead of (0, 0)"), (1, "with padding=(0, 0) instead of (1, 1)")]
)
def test_the_padding_that_would_fit_is_named(padding: int, hint: str) -> None:
    input, weight = torch.randn(1, 2, 20, 30), torch.randn(2, 2, 3, 3)
    size = (20, 30) if padding == 0 else (18, 28)
    with pytest.raises(ValueError, match=re.escape(f"; {hint} it would have {size[0]}x{size[1]}")):
        dk.deform_conv2d(input, torch.zeros(1, 18, *size), weight, padding=padding)
