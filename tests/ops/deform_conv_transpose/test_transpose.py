"""The transposed deformable convolution beside torch's, and what is said about wrong arguments."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import operators

OURS = {1: dk.deform_conv_transpose1d, 2: dk.deform_conv_transpose2d, 3: dk.deform_conv_transpose3d}
PLAIN = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_zero_offsets_give_the_plain_transposed_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(least, most)) for _ in range(axes))

    kernel, stride, dilation, size = each(1, 3), each(1, 3), each(1, 3), each(1, 4)
    # Torch allows as much as the larger of stride and dilation.
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    whole = [(n - 1) * s + d * (k - 1) + e for n, s, d, k, e in zip(size, stride, dilation, kernel, extra, strict=True)]
    padding = tuple(data.draw(st.integers(0, w // 2)) for w in whole)
    groups, offset_groups = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 3), (2, 4)]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    out_channels = 12 * data.draw(st.integers(1, 2))
    input = torch.randn(2, groups * data.draw(st.integers(1, 3)), *size, dtype=torch.float64)
    weight = torch.randn(input.shape[1], out_channels // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(out_channels, dtype=torch.float64)
    taps = weight[0, 0].numel()
    offset = torch.zeros(2, offset_groups * taps * axes, *size, dtype=torch.float64)
    mask = torch.ones(2, offset_groups * taps, *size, dtype=torch.float64)
    steps = (stride, padding, extra, groups, dilation)
    values = [input, weight, bias]
    expected = evaluate(lambda *v: PLAIN[axes](*v, *steps), values, [0, 1, 2], torch.float64)
    for factors in (None, mask):
        actual = evaluate(
            lambda i, w, b, factors=factors: OURS[axes](i, offset, w, b, *steps, factors),
            values,
            [0, 1, 2],
            torch.float64,
        )
        for name, one, other in zip(("output", "input", "weight", "bias"), actual, expected, strict=True):
            assert_close(one, other, name=name)


def test_whole_offsets_move_the_output(axes: int) -> None:
    """The same shift at every tap and position moves what does not leave the output."""
    size, shift = (4, 3, 3)[:axes], (1, -2, 1)[:axes]
    input, weight = torch.randn(1, 3, *size), torch.randn(3, 2, *[2] * axes)
    offset = torch.tensor(shift, dtype=torch.float32).repeat(2**axes).reshape(1, -1, *[1] * axes).expand(-1, -1, *size)
    steps = {"stride": 2, "padding": 0}
    plain = PLAIN[axes](input, weight, **steps)
    moved = OURS[axes](input, offset, weight, **steps)
    for axis, by in enumerate(shift):
        plain = plain.roll(by, axis + 2)
        edge = plain.narrow(axis + 2, 0 if by > 0 else plain.shape[axis + 2] + by, abs(by))
        edge.zero_()
    assert_close(moved, plain.double())


def test_a_bias_in_half_precision_keeps_the_dtype(axes: int) -> None:
    input, weight = torch.randn(1, 3, *[4] * axes), torch.randn(3, 2, *[2] * axes)
    offset, bias = torch.zeros(1, 2**axes * axes, *[4] * axes), torch.randn(2)
    half = [t.bfloat16() for t in (input, weight, bias)]
    expected = OURS[axes](half[0], offset, half[1], half[2])
    assert expected.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(OURS[axes](input, offset, weight, bias), expected)


def test_no_samples(axes: int) -> None:
    input, weight = torch.randn(0, 3, *[4] * axes), torch.randn(3, 2, *[2] * axes, requires_grad=True)
    output = OURS[axes](input, torch.zeros(0, 2**axes * axes, *[4] * axes), weight, stride=2)
    assert output.shape == (0, 2, *[8] * axes)
    output.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def sound() -> dict[str, Any]:
    return {
        "input": torch.randn(2, 6, 5, 4),
        "offset": torch.zeros(2, 48, 5, 4),
        "weight": torch.randn(6, 2, 3, 4),
        "bias": torch.randn(4),
        "stride": 2,
        "padding": 1,
        "groups": 2,
        "mask": torch.ones(2, 24, 5, 4),
    }


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"input": None}, TypeError, "input is a NoneType; it must be a torch.Tensor"),
    "no offset": ({"offset": None}, TypeError, "offset is a NoneType"),
    "dtype": ({"weight": torch.zeros(6, 2, 3, 4).half()}, TypeError, "weight has dtype torch.float16"),
    "axes": ({"weight": torch.zeros(6, 2, 3)}, ValueError, r"weight has shape \[6, 2, 3\]; a 2-D"),
    "channels": ({"weight": torch.zeros(4, 2, 3, 4)}, ValueError, "input has 6 channels; weight has 4 input channels"),
    "empty weight": ({"weight": torch.zeros(6, 0, 3, 4)}, ValueError, "every axis must have at least one element"),
    "groups": ({"groups": 4}, ValueError, "groups is 4; it must divide weight's 6 input channels"),
    "no group": ({"groups": 0}, ValueError, "groups is 0; it must be at least 1"),
    "half a group": ({"groups": 1.5}, TypeError, "groups is 1.5; it must be an int"),
    "stride": ({"stride": 0}, ValueError, "stride is 0; each value must be at least 1"),
    "output_padding": (
        {"output_padding": (0, 2)},
        ValueError,
        r"output_padding is \(0, 2\); each value must be less than the stride, 2, or the dilation, 1",
    ),
    "no output": ({"padding": 9}, ValueError, "output size is -7x-8, from input 5x4, kernel 3x4, stride 2x2"),
    "empty input": (
        {"input": torch.zeros(2, 6, 0, 4), "offset": torch.zeros(2, 48, 0, 4), "mask": None},
        ValueError,
        "input has spatial size 0x4; every axis must have at least one element",
    ),
    "long stride": (
        {"stride": 2**39},
        ValueError,
        r"stride is \[549755813888, 549755813888\]; times input 5x4 it must be at most 2\^40",
    ),
    "long dilation": ({"dilation": 2**39}, ValueError, r"dilation is .*; times kernel 3x4 it must be at most 2\^40"),
    "offset channels": ({"offset": torch.zeros(2, 50, 5, 4)}, ValueError, "needs a multiple of 24 = 12 taps x 2"),
    "offset groups": (
        {"offset": torch.zeros(2, 72, 5, 4)},
        ValueError,
        "thus 3 offset groups; they must divide the output's 4 channels",
    ),
    "mask channels": ({"mask": torch.zeros(2, 12, 5, 4)}, ValueError, "mask has 12 channels"),
    "mask size": ({"mask": torch.zeros(2, 24, 5, 5)}, ValueError, "mask has spatial size 5x5; input has 5x4"),
    "offset batch": ({"offset": torch.zeros(1, 48, 5, 4)}, ValueError, "offset has batch size 1; input has 2"),
    "bias": ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \[6\]; the output has 4 channels"),
    "boundary": ({"boundary": "circular"}, ValueError, "boundary is 'circular'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=f"^(?s:.)*{message}"):
        dk.deform_conv_transpose2d(**{**sound(), **change})


def test_the_operator_takes_no_output_padding_of_whole_steps() -> None:
    operator = operators["deform_conv_transpose"]
    input, weight = torch.zeros(1, 1, 3), torch.zeros(1, 1, 2)
    message = r"output_padding is \[?2\]?; each value must be less than stride \[?2"
    with pytest.raises((ValueError, RuntimeError), match=message):
        operator(input, torch.zeros(1, 2, 3), weight, [2], [0], [2], 1, [3], None, 0)


def test_names_and_places_of_arguments(axes: int) -> None:
    """The order is that of torch's transposed convolution, with the offset after the input and the mask at the end."""
    input, weight = torch.randn(1, 4, *[3] * axes), torch.randn(4, 2, *[2] * axes)
    offset, mask = torch.randn(1, 2**axes * axes, *[3] * axes), torch.rand(1, 2**axes, *[3] * axes)
    bias, steps = torch.randn(4), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2}
    by_name = OURS[axes](mask=mask, **steps, bias=bias, weight=weight, offset=offset, input=input)
    by_place: Tensor = OURS[axes](input, offset, weight, bias, *steps.values(), mask)
    assert_equal(by_place, by_name)
