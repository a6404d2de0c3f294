"""Packed layers whose offsets are bounded, predicted from something else, or added to given ones."""

from typing import Any

import pytest
import torch

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.nn import PackedDeformConv1d, PackedDeformConv2d, PackedDeformConv3d

SIZE = (7, 6, 5)
LAYERS: dict[int, Any] = {1: PackedDeformConv1d, 2: PackedDeformConv2d, 3: PackedDeformConv3d}


def layer_of(axes: int, **options: Any) -> Any:
    layer = LAYERS[axes](4, 6, 3, 2, 1, modulated=True, offset_groups=2, **options).double()
    for parameter in layer.offset_head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("each", [False, True], ids=["for all taps", "for each tap"])
def test_guided_alignment_is_its_formula(axes: int, each: bool) -> None:
    layer, size = layer_of(axes, max_offset=1.5, condition_channels=3), SIZE[:axes]
    out = [(n - 1) // 2 + 1 for n in size]
    taps = 3**axes
    values = [
        torch.randn(2, 4, *size).double(),
        torch.randn(2, 3, *size).double(),
        torch.randn(2, 2 * taps * axes if each else axes, *out).double(),
    ]

    def formula(input: torch.Tensor, condition: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        raw = layer.offset_head(condition)
        offset, logit = raw[:, : 2 * taps * axes], raw[:, 2 * taps * axes :]
        base = base if each else torch.cat([base] * (2 * taps), 1)
        function = getattr(dk, f"deform_conv{axes}d")
        mask = 2 * logit.sigmoid()
        return function(input, base + 1.5 * offset.tanh(), layer.weight, layer.bias, 2, 1, mask=mask)

    actual = evaluate(layer, values, [0, 1, 2], torch.float64)
    expected = evaluate(formula, values, [0, 1, 2], torch.float64)
    for name, one, truth in zip(("output", "input", "condition", "base_offset"), actual, expected, strict=True):
        assert_close(one, truth, name=name)


def test_samples_without_a_batch(axes: int) -> None:
    layer, size = layer_of(axes, max_offset=2.0), SIZE[:axes]
    input, condition = torch.randn(4, *size).double(), torch.randn(4, *size).double()
    flow = torch.randn(axes, *[(n - 1) // 2 + 1 for n in size]).double()
    whole = layer(input[None], condition[None], flow[None])
    assert_close(layer(input, condition, flow), whole[0])


def test_arguments_that_are_wrong() -> None:
    layer, given = layer_of(2), layer_of(2, condition_channels=3)
    assert "max_offset=2.5, condition_channels=7" in repr(LAYERS[2](4, 6, 3, max_offset=2.5, condition_channels=7))
    input, flow = torch.zeros(1, 4, 7, 6).double(), torch.zeros(1, 2, 4, 3).double()
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: given(input), ValueError, "condition is None; this layer has condition_channels=3"),
        (lambda: given(input, input), ValueError, r"condition has shape .* it must be \[1, 3, 7, 6\]"),
        (lambda: layer(input, input[..., :5]), ValueError, r"condition has shape .* it must be \[1, 4, 7, 6\]"),
        (
            lambda: layer(input, base_offset=flow[:, :, :3]),
            ValueError,
            r"base_offset has shape .*; it must be \[1, 36, 4, 3\], or \[1, 2, 4, 3\]",
        ),
        (lambda: layer(input, base_offset=flow.float()), TypeError, "base_offset has dtype torch.float32"),
        (lambda: layer_of(2, max_offset=0), ValueError, "max_offset is 0; it must be positive"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
