"""The operators in torch's counter of operations."""

import subprocess
import sys
from math import prod

import pytest
import torch
from rooms import Call, Of, representatives
from torch.utils.flop_counter import FlopCounterMode

import deformkit as dk

IMPORTS = """
import importlib, sys, torch, deformkit
assert "torch.utils.flop_counter" not in sys.modules
import torch.utils.flop_counter
assert torch.ops.deformkit.deform_conv in torch.utils.flop_counter.flop_registry
assert "torch.utils.flop_counter" not in [getattr(finder, "_name", None) for finder in sys.meta_path]
importlib.reload(deformkit)
"""
INPUT, WEIGHT = torch.randn(2, 4, 7, 5), torch.randn(6, 4, 3, 3)


def counted(counter: FlopCounterMode, name: str) -> int:
    return int(counter.get_flop_counts()["Global"][getattr(torch.ops.deformkit, name)])


@pytest.mark.parametrize("call", representatives(), ids=str)
def test_every_operator_is_counted_forward_and_backward(call: Call) -> None:
    network = Of(call)
    for name, value in zip(network.names, network.values, strict=True):
        value.requires_grad_(value.is_floating_point() and name != "rois")
    with FlopCounterMode(display=False) as counter:
        network(*network.values).sum().backward()
    counts = {str(packet): count for packet, count in counter.get_flop_counts()["Global"].items()}
    assert len(counts) >= 2 and all(count > 0 for count in counts.values())
    assert any(call.operator.name in name for name in counts)


def test_a_convolution_is_its_product_and_its_samples() -> None:
    with FlopCounterMode(display=False) as plain:
        torch.nn.functional.conv2d(INPUT, WEIGHT, padding=1)
    with FlopCounterMode(display=False) as counter:
        dk.deform_conv2d(INPUT, torch.zeros(2, 18, 7, 5), WEIGHT, padding=1)
    samples = 2 * 7 * 5 * 9 * 4
    assert counted(counter, "deform_conv") == plain.get_total_flops() + 2 * 4 * samples


def test_aggregation_takes_five_multiplications_a_sample() -> None:
    """As the published code of InternImage counts: one for each corner, and one for the weight of the tap."""
    value, offset, weight = torch.randn(2, 8, 8, 2, 4), torch.zeros(2, 8, 8, 2, 9, 2), torch.rand(2, 8, 8, 2, 9)
    with FlopCounterMode(display=False) as counter:
        dk.deform_aggregate(value, offset, weight, 3, 1, 1)
    assert counted(counter, "deform_aggregate") == 2 * 5 * prod(value.shape) * 9


def test_formulas_are_there_as_soon_as_the_counter_is() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_layers_are_counted_where_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), dk.nn.PackedDeformConv2d(4, 6, 3, padding=1))
    with FlopCounterMode(display=False) as counter:
        model(INPUT)
    inner = counter.get_flop_counts()["Sequential.1"]
    assert set(inner) == {torch.ops.aten.convolution, torch.ops.deformkit.deform_conv}
