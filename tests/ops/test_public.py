"""``torch.fx``, and types with ``__torch_function__``, see calls of the public functions whole."""

from typing import Any

import pytest
from rooms import Call, Of, public, representatives
from torch import Tensor, nn
from torch.fx import symbolic_trace

import deformkit as dk
from deformkit._testing import assert_equal

one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)


class OfFirst(nn.Module):
    """A call as a function of its first tensor alone."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = Of(call)

    def forward(self, first: Tensor) -> Tensor:
        return self.call(2 * first, *self.call.values[1:]) + 1


@one_call_each
def test_a_call_is_a_node_of_fx(call: Call) -> None:
    network = OfFirst(call)
    traced, first = symbolic_trace(network), network.call.values[0]
    assert network.call.function in {node.target for node in traced.graph.nodes}
    assert_equal(traced(first), network(first))


@one_call_each
def test_a_subclass_takes_the_call(call: Call) -> None:
    seen = []

    class Seeing(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    network = Of(call)
    first, *rest = network.values
    output = network(first.as_subclass(Seeing), *rest)
    assert type(output) is Seeing and seen == [network.function]
    assert_equal(output.as_subclass(Tensor), network(first, *rest))


def test_functions_are_compiled_each_by_itself() -> None:
    """``torch.compile`` gives up a code object that it had to compile too often."""
    functions = {public(call)[0] for call in representatives()}
    assert len({function.__code__ for function in functions}) == len(functions) > 1


def test_a_layer_that_is_no_leaf_says_so() -> None:
    with pytest.raises(TypeError, match=r"^input is a Proxy; it must be a torch.Tensor. For torch.fx make this layer"):
        symbolic_trace(nn.Sequential(dk.nn.PackedDeformConv2d(8, 8, 3)))
