"""``torch.fx``, and types with ``__torch_function__``, see calls of the public functions whole."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import deformkit as dk
import deformkit.ops
from deformkit._testing import assert_equal

SIZE = {1: (24,), 2: (8, 9), 3: (4, 5, 6)}
LEVELS = [(12, 12), (6, 6)]
LOCATIONS = torch.rand(2, 5, 2, 2, 4, 2)
IMAGE = torch.randn(2, 8, 8, 9)

# The arguments of every public function, of which the first is replaced.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "deform_aggregate": {
        "value": torch.randn(2, 8, 9, 2, 4),
        "offset": torch.randn(2, 8, 9, 2, 9, 2),
        "weight": torch.rand(2, 8, 9, 2, 9),
        "kernel_size": 3,
        "padding": 1,
    },
    "deform_correlate": {
        "query": torch.randn(2, 5, 2, 8),
        "key": torch.randn(2, 180, 2, 8),
        "spatial_shapes": LEVELS,
        "sampling_locations": LOCATIONS,
    },
    "deform_roi_pool": {"input": IMAGE, "rois": torch.tensor([[0.0, 1, 1, 5, 6], [1, 2, 2, 7, 7]]), "output_size": 2},
    "deform_sample": {"input": IMAGE, "points": 8 * torch.rand(2, 1, 7, 2)},
    "deform_splat": {"input": torch.randn(2, 8, 7), "points": 8 * torch.rand(2, 1, 7, 2), "size": (8, 9)},
    "ms_deform_attn": {
        "value": torch.randn(2, 180, 2, 8),
        "spatial_shapes": LEVELS,
        "sampling_locations": LOCATIONS,
        "attention_weights": torch.rand(2, 5, 2, 2, 4),
    },
}
for n in (1, 2, 3):
    window = {"input": torch.randn(2, 8, *SIZE[n]), "offset": torch.randn(2, n * 3**n, *SIZE[n])}
    ARGUMENTS[f"deform_conv{n}d"] = {**window, "weight": torch.randn(4, 8, *[3] * n), "padding": 1}
    ARGUMENTS[f"deform_conv_transpose{n}d"] = {**window, "weight": torch.randn(8, 4, *[3] * n)}


def test_every_function_is_here() -> None:
    assert set(ARGUMENTS) == {name for name, value in vars(deformkit.ops).items() if inspect.isfunction(value)}


@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_call_is_a_node_of_fx(name: str, by_name: bool) -> None:
    function = getattr(dk, name)
    (first_name, first), *rest = ARGUMENTS[name].items()

    class Network(nn.Module):
        def forward(self, first: Tensor) -> Tensor:
            if by_name:
                return function(**{first_name: 2 * first}, **dict(rest)) + 1
            return function(2 * first, **dict(rest)) + 1

    network = Network()
    traced = symbolic_trace(network)
    assert function in {node.target for node in traced.graph.nodes}
    assert_equal(traced(first), network(first))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_subclass_takes_the_call(name: str) -> None:
    seen = []

    class Seeing(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    function = getattr(dk, name)
    (_, first), *rest = ARGUMENTS[name].items()
    output = function(first.as_subclass(Seeing), **dict(rest))
    assert type(output) is Seeing and seen == [function]
    assert_equal(output.as_subclass(Tensor), function(first, **dict(rest)))


def test_functions_are_compiled_each_by_itself() -> None:
    """``torch.compile`` gives up a code object that it had to compile too often."""
    assert len({getattr(dk, name).__code__ for name in ARGUMENTS}) == len(ARGUMENTS)


def test_a_layer_that_is_no_leaf_says_so() -> None:
    with pytest.raises(TypeError, match=r"^input is a Proxy; it must be a torch.Tensor. For torch.fx make this layer"):
        symbolic_trace(nn.Sequential(dk.nn.PackedDeformConv2d(8, 8, 3)))
