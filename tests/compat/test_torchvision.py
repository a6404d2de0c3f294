"""Names of torchvision: signatures, values, gradients and state-dicts are those of torchvision, if it is installed."""

import inspect
import io
import os
from typing import Any

import drawn
import pytest
import torch
from hosts import run_elsewhere
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.compat import torchvision as compat

SEEDS = range(24)
NAMES = ("input", "offset", "weight", "bias", "mask")


def arguments(seed: int) -> dict[str, Any]:
    """A random call, by name. Every third one has its offsets on grid lines, including those of the border."""
    named = drawn.conv(seed).arguments(torch.float64, seed=seed)
    del named["boundary"]
    return {**named, "offset": named["offset"].round()} if seed % 3 == 0 else named


def results(named: dict[str, Any]) -> dict[str, Tensor]:
    """Our output and every gradient, for the same cotangent as on the side of torchvision."""
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
    """The results of torchvision for the calls, and one of its layers."""
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
    """Parameters from the same seed, state-dict, output, signatures and text are equal."""
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


class User(nn.Module):
    """A network that calls the function and contains a layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.layer = compat.DeformConv2d(8, 4, 3, stride=2, padding=(1, 2), groups=2, bias=bias)

    def forward(self, input: Tensor, offset: Tensor, small: Tensor, mask: Tensor) -> Tensor:
        features = compat.deform_conv2d(input, offset, self.weight, padding=(1, 1)).relu()
        return self.layer(features, small, mask=mask)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("bias", [False, True])
def test_torchscript(bias: bool) -> None:
    """Scripting, saving and loading, and tracing keep values and gradients."""
    network = User(bias)
    inputs = [torch.randn(2, 8, 9, 7), torch.randn(2, 36, 9, 7), torch.randn(2, 18, 5, 5), torch.rand(2, 9, 5, 5)]

    def evaluate_network(module: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = module(*leaves)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    expected = evaluate_network(network)
    file = io.BytesIO()
    scripted = torch.jit.script(network)
    torch.jit.save(scripted, file)
    file.seek(0)
    for module in (scripted, torch.jit.load(file), torch.jit.trace(network, tuple(inputs))):
        for actual, value in zip(evaluate_network(module), expected, strict=True):
            assert_equal(actual, value)
    with pytest.raises(torch.jit.Error, match="input has 4 channels; this layer has in_channels=8"):
        torch.jit.script(network.layer)(torch.zeros(1, 4, 5, 5), inputs[2])


@pytest.mark.parametrize("step", [2, (2, 2), [2, 2]], ids=["int", "tuple", "list"])
def test_torchscript_accepts_steps_in_every_form(step: Any) -> None:
    input, weight = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3)
    named = {"stride": step, "padding": step, "dilation": step}
    expected = compat.deform_conv2d(input, torch.zeros(1, 18, 5, 5), weight, **named)
    assert_equal(torch.jit.script(compat.deform_conv2d)(input, torch.zeros(1, 18, 5, 5), weight, **named), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_is_that_of_torchvision(half: torch.dtype, dtype: torch.dtype) -> None:
    """Everything is computed in float32, or float64; the output has the dtype of the input."""
    layer = compat.DeformConv2d(4, 6, 3, padding=1)
    input, offset, mask = torch.randn(2, 4, 5, 6), torch.randn(2, 18, 5, 6), torch.rand(2, 9, 5, 6)
    if dtype == torch.float64:
        layer, offset, mask = layer.double(), offset.double(), mask.double()
    input = input.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = layer(input.to(exact), offset, mask).to(dtype)
    with torch.autocast("cpu", half):
        assert_equal(layer(input, offset, mask), expected)
        assert_equal(torch.compile(layer, fullgraph=True, backend="eager")(input, offset, mask), expected)


def test_torch_fx_keeps_the_call() -> None:
    """Feature extraction of torchvision traces a model, and has its own layer alone among the leaves."""
    layer, inputs = compat.DeformConv2d(4, 6, 3, padding=1), (torch.randn(2, 4, 9, 8), torch.randn(2, 18, 9, 8))
    traced = torch.fx.symbolic_trace(layer, concrete_args={"mask": None})
    assert compat.deform_conv2d in {node.target for node in traced.graph.nodes}
    assert_equal(traced(*inputs), layer(*inputs))


def test_errors() -> None:
    layer = compat.DeformConv2d(8, 4, 3)
    wrong = (torch.zeros(1, 20, 3, 3), torch.zeros(1, 18, 3, 4), torch.zeros(1, 18, 3, 3).long())
    for offset, error in zip(wrong, (ValueError, ValueError, TypeError), strict=True):
        for expected in (error, RuntimeError):
            with pytest.raises(expected, match="offset has"):
                compat.deform_conv2d(torch.zeros(1, 8, 5, 5), offset, layer.weight)
    for expected in (ValueError, RuntimeError):
        with pytest.raises(expected, match="input has 4 channels"):
            layer(torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 3, 3))
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
