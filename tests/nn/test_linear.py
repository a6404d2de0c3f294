"""Linear layers are computed as convolutions if that is faster, and by the layer itself otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from deformkit._testing import assert_close
from deformkit.nn import _linear
from deformkit.nn._linear import linear

# If one of them is missing, the layer itself is always called.
CONVOLVES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@pytest.fixture(autouse=True)
def _products_of_small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_MANY_PRODUCTS", 200 * 8 * 8)


class Convolutions(TorchDispatchMode):
    """The number of them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def convolved(layer: nn.Module, input: Tensor) -> bool:
    with Convolutions() as seen:
        linear(layer, input)
    return seen.count > 0


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "shape", [(1, 200, 24), (2, 307, 24), (3, 14, 15, 24), (5000, 24), (2, 3, 4, 5, 6, 24)], ids=str
)
def test_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias)
    input, ahead = torch.randn(shape), torch.randn(*shape[:-1], 40)
    assert convolved(layer, input) == CONVOLVES

    def evaluate(run: Callable[[nn.Module, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf, cast = input.to(dtype).requires_grad_(), nn.Linear(24, 40, bias).to(dtype)
        cast.load_state_dict(layer.state_dict())
        output = run(cast, leaf)
        return [output, *torch.autograd.grad(output, [leaf, *cast.parameters()], ahead.to(dtype))]

    def plain(layer: nn.Module, input: Tensor) -> Tensor:
        return layer(input)

    found, reference = evaluate(linear, torch.float32), evaluate(plain, torch.float32)
    for actual, true, known in zip(found, evaluate(plain, torch.float64), reference, strict=True):
        assert actual.shape == known.shape and actual.stride() == known.stride()
        assert_close(actual, true, known)


def test_input_of_any_layout() -> None:
    layer = nn.Linear(24, 8)
    for input in (
        torch.randn(2, 24, 300).mT,
        torch.randn(2, 300, 48)[..., ::2],
        torch.randn(1, 1, 24).expand(2, 150, 24),
    ):
        assert convolved(layer, input) == CONVOLVES
        torch.testing.assert_close(linear(layer, input), layer(input))


def with_hook(register: str) -> nn.Module:
    layer = nn.Linear(8, 8)
    getattr(layer, register)(lambda *args: None)
    return layer


def given_forward() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda input: F.linear(input, layer.weight)
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


class Opaque(torch.Tensor):
    """A weight that only a linear map can use."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not F.conv2d
        return super().__torch_function__(func, types, args, kwargs or {})


def of_opaque_weight() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Opaque))
    assert type(layer.weight) is Opaque
    return layer


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


OTHERS = {
    "forward hook": lambda: with_hook("register_forward_hook"),
    "forward pre-hook": lambda: with_hook("register_forward_pre_hook"),
    "backward hook": lambda: with_hook("register_full_backward_hook"),
    "backward pre-hook": lambda: with_hook("register_full_backward_pre_hook"),
    "forward of its own": given_forward,
    "pruned": pruned,
    "weight of another class": of_opaque_weight,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "subclass": lambda: Doubling(8, 8),
    "another layer": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "float64": lambda: nn.Linear(8, 8).double(),
    "bfloat16": lambda: nn.Linear(8, 8).bfloat16(),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_layers_compute_themselves(make: Callable[[], nn.Module]) -> None:
    layer = make()
    input = torch.randn(300, 8, dtype=next(layer.parameters()).dtype)
    assert not convolved(layer, input)
    assert torch.equal(linear(layer, input), layer(input))


def test_hooks_run() -> None:
    calls = []
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda *args: calls.append("own"))
    linear(layer, torch.randn(300, 8))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append("global"))
    linear(nn.Linear(8, 8), torch.randn(300, 8))
    handle.remove()
    assert calls == ["own", "global"]


@pytest.mark.filterwarnings("ignore:TF32")
def test_small_products_autocast_and_compiled_code_take_the_layer() -> None:
    layer, input = nn.Linear(8, 8), torch.randn(300, 8)
    assert convolved(layer, input) == CONVOLVES
    assert not convolved(layer, input[:199])
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolved(layer, input) and linear(layer, input).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not convolved(layer, input)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    compiled: Callable[[nn.Module, Tensor], Tensor] = torch.compile(linear, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(layer, input), layer(input))
    assert "conv" not in graphs[0] and "linear" in graphs[0]


def test_wrong_width_is_the_error_of_the_layer() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(nn.Linear(8, 8), torch.randn(300, 16))


def test_transforms() -> None:
    layer, input = nn.Linear(8, 8), torch.randn(2, 300, 8)
    torch.testing.assert_close(torch.func.vmap(lambda value: linear(layer, value))(input), layer(input))
    tangent = torch.randn_like(input)
    _, along = torch.func.jvp(lambda value: linear(layer, value), (input,), (tangent,))
    torch.testing.assert_close(along, F.linear(tangent, layer.weight))
