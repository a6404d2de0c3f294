"""Names of torchvision: signatures, values, gradients and state-dicts are torchvision's own, where it is installed."""

import inspect
import os
from typing import Any

import drawn
import pytest
import torch
from close import assert_close, assert_equal
from hosts import run_elsewhere
from rooms import evaluate
from torch import Tensor

import deformkit as dk
from deformkit.compat import torchvision as compat

SEEDS = range(24)
NAMES = ("input", "offset", "weight", "bias", "mask")


def arguments(seed: int) -> dict[str, Any]:
    """A random call by name. Every third one has its offsets on grid lines, the border's included."""
    named = drawn.conv(seed).arguments(torch.float64, seed=seed)
    del named["boundary"]
    return {**named, "offset": named["offset"].round()} if seed % 3 == 0 else named


def results(named: dict[str, Any]) -> dict[str, Tensor]:
    """Output and every gradient of ours, for the cotangent that the torchvision side draws too."""
    names = [name for name in NAMES if named[name] is not None]
    keyed = [named[name] for name in names]

    def function(*values: Tensor) -> Tensor:
        return compat.deform_conv2d(**{**named, **dict(zip(names, values, strict=True))})

    return dict(zip(["output", *names], evaluate(function, keyed, range(len(names)), torch.float64), strict=True))


THEIRS = """
import inspect, sys, torch
from torchvision import ops

def cotangent(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

work = []
for call in torch.load(sys.argv[1]):
    tensors = {k: v.requires_grad_() for k, v in call.items() if isinstance(v, torch.Tensor)}
    output = ops.deform_conv2d(**call)
    grads = torch.autograd.grad(output, list(tensors.values()), cotangent(output))
    work.append({"output": output.detach(), **dict(zip(tensors, grads))})
torch.manual_seed(0)
layer = ops.DeformConv2d(8, 4, (3, 2), 2, 1, 1, 2)
input, offset, mask = torch.randn(2, 8, 9, 7), torch.randn(2, 24, 5, 4), torch.rand(2, 12, 5, 4)
call = (input, offset, mask)
made = {"state": layer.state_dict(), "call": call, "output": layer(*call).detach()}
made["text"] = repr(layer)
made["signatures"] = [
    [(p.name, repr(p.default)) for p in inspect.signature(function).parameters.values()]
    for function in (ops.deform_conv2d, ops.DeformConv2d, layer.forward)
]
torch.save((work, made), sys.argv[2])
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """What torchvision makes of the calls, and a layer of its own."""
    if "DEFORMKIT_RIVALS_PYTHON" not in os.environ:
        pytest.skip("DEFORMKIT_RIVALS_PYTHON does not name a Python with torchvision")
    calls = [arguments(seed) for seed in SEEDS]
    return run_elsewhere("DEFORMKIT_RIVALS_PYTHON", THEIRS, calls, tmp_path_factory.mktemp("torchvision"))


@pytest.mark.parametrize("seed", SEEDS)
def test_values_and_gradients(theirs: Any, seed: int) -> None:
    ours, expected = results(arguments(seed)), theirs[0][seed]
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert_close(ours[name], value, name=name)


def test_the_layer(theirs: Any) -> None:
    """The same parameters from the same seed, the same state-dict, output, signatures and text."""
    made = theirs[1]
    torch.manual_seed(0)
    layer = compat.DeformConv2d(8, 4, (3, 2), 2, 1, 1, 2)
    assert layer.state_dict().keys() == made["state"].keys()
    for name, value in made["state"].items():
        assert_equal(layer.state_dict()[name], value, name)
    layer.load_state_dict(made["state"])
    truth = layer.double()(*(value.double() for value in made["call"]))
    assert_close(layer.float()(*made["call"]), truth, made["output"])
    assert_close(made["output"], truth)
    assert repr(layer) == made["text"]
    for function, expected in zip(
        (compat.deform_conv2d, compat.DeformConv2d, layer.forward), made["signatures"], strict=True
    ):
        assert [(p.name, repr(p.default)) for p in inspect.signature(function).parameters.values()] == expected


def test_the_number_of_offset_groups_is_read_off_the_offsets() -> None:
    layer = compat.DeformConv2d(8, 4, 3, padding=1)
    input = torch.randn(2, 8, 5, 6)
    for groups in (1, 2, 4):
        offset = torch.randn(2, 18 * groups, 5, 6)
        same = dk.nn.DeformConv2d(8, 4, 3, padding=1, offset_groups=groups)
        same.load_state_dict(layer.state_dict())
        assert_equal(layer(input, offset), same(input, offset))
        assert_equal(layer.sampling_locations(offset), same.sampling_locations(offset))
        assert_equal(layer.sampling_locations(offset[0]), same.sampling_locations(offset[0]))


def test_errors() -> None:
    layer = compat.DeformConv2d(8, 4, 3)
    with pytest.raises(ValueError, match="input has 4 channels; this layer has in_channels=8"):
        layer(torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 3, 3))
    with pytest.raises(ValueError, match="offset has 20 channels"):
        layer(torch.zeros(1, 8, 5, 5), torch.zeros(1, 20, 3, 3))
    with pytest.raises(ValueError, match=r"offset has shape .*; it must have 4 axes"):
        layer.sampling_locations(torch.zeros(18))
    with pytest.raises(TypeError, match="input is a list"):
        layer([], torch.zeros(1, 18, 3, 3))
    with pytest.raises(TypeError, match="padding is 'same'; it must be an int"):
        compat.DeformConv2d(8, 4, 3, padding="same")
