"""Locations and weights with one head or one level for all."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

SHAPES = [(5, 4), (3, 2), (2, 2)]
HEADS, LEVELS = (1, 4), (1, 3)


def tensors(*axes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The value with 4 heads, locations of some heads and levels, and weights of some."""
    value = torch.randn(2, 30, 4, 6, dtype=dtype)
    locations, weights = torch.rand(2, 7, *axes[:2], 3, 2, dtype=dtype), torch.randn(2, 7, *axes[2:], 3, dtype=dtype)
    return value, locations, weights


@pytest.mark.parametrize("axes", list(product(HEADS, LEVELS, HEADS, LEVELS)), ids=str)
def test_values_and_gradients_are_those_of_copies(axes: tuple[int, ...]) -> None:
    leaves = [value.requires_grad_() for value in tensors(*axes, dtype=torch.float64)]
    value, locations, weights = leaves
    result = dk.ms_deform_attn(value, SHAPES, locations, weights)
    full = (locations.expand(-1, -1, 4, 3, -1, -1).contiguous(), weights.expand(-1, -1, 4, 3, -1).contiguous())
    expected = dk.ms_deform_attn(value, SHAPES, *full)
    assert_equal(result, expected)
    cotangent = torch.randn_like(result)
    grads = torch.autograd.grad(result, leaves, cotangent)
    for one, other in zip(grads, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        assert_close(one, other)


class Strides(TorchDispatchMode):
    """Keeps the strides of the tensors that our operators get."""

    found: list[list[tuple[int, ...]]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deformkit":
            self.found.append([value.stride() for value in args if isinstance(value, Tensor)])
        return func(*args, **(kwargs or {}))


def test_heads_are_not_copied_on_the_way_to_the_kernel() -> None:
    value, locations, weights = tensors(1, 3, 1, 3)
    with Strides() as strides:
        strides.found = []
        dk.ms_deform_attn(value, SHAPES, locations, weights)
        dk.deform_correlate(torch.randn(2, 7, 4, 6), value, SHAPES, locations)
    [(_, points, factors), (_, _, again)] = strides.found
    assert points[2] == factors[2] == again[2] == 0


def test_the_second_form_and_scripts() -> None:
    value, locations, weights = tensors(1, 3, 4, 3)
    expected = dk.ms_deform_attn(value, SHAPES, locations, weights)
    flat = dk.ms_deform_attn(value, SHAPES, locations.flatten(3, 4), weights.flatten(3, 4), num_points=3)
    assert_equal(flat, expected)
    assert_equal(torch.jit.script(dk.ms_deform_attn)(value, [list(s) for s in SHAPES], locations, weights), expected)


def test_other_sizes_raise() -> None:
    value, locations, weights = tensors(2, 3, 2, 3)
    with pytest.raises(ValueError, match="sampling_locations has 2 heads; value has 4"):
        dk.ms_deform_attn(value, SHAPES, locations, weights)
    value, locations, weights = tensors(1, 3, 4, 2)
    with pytest.raises(ValueError, match=r"attention_weights has shape \[2, 7, 4, 2, 3\]; with"):
        dk.ms_deform_attn(value, SHAPES, locations, weights)
