"""``deformkit.export.decomposed``: models in plain operations, for runtimes that do not know deformkit."""

from typing import Any

import pytest
import torch
from rooms import Call, Of, representatives
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deformkit._testing import assert_close
from deformkit.export import decomposed
from deformkit.ops._library import operators

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
# What other runtimes lack, or take for another operation.
MISSING = (
    "bitwise_and",
    "bitwise_or",
    "any",
    "alias",
    "detach",
    "lift_fresh_copy",
    "where.Scalar",
    "einsum",
    "grid_sampler",
)


def exported(model: Of, dynamic: bool = False, **options: Any) -> torch.export.ExportedProgram:
    if dynamic:
        auto = tuple({axis: torch.export.Dim.AUTO for axis in range(value.dim())} for value in model.values)
        options["dynamic_shapes"] = (auto,)
    with torch.no_grad(), decomposed():
        return torch.export.export(model.eval(), model.values, **options)


def check_plain(program: torch.export.ExportedProgram, most_axes: int) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten" and not any(name in str(node.target) for name in MISSING), (
                node.target
            )
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                assert not isinstance(value, Tensor) or value.dim() <= most_axes, (node, value.shape)
    assert all(value.numel() <= 64 for value in program.constants.values() if isinstance(value, Tensor))


def check(call: Call, program: torch.export.ExportedProgram, model: Of) -> None:
    expected = model(*model.values)
    check_plain(program, max(5, expected.dim()))
    truth = call.operator.reference(*call.arguments(torch.float64))
    assert_close(program.module()(*model.values).reshape(truth.shape), truth, expected.reshape(truth.shape))


@pytest.mark.parametrize("call", [call for call in representatives() if not str(call).endswith("1d")], ids=str)
def test_every_operator_is_plain(call: Call) -> None:
    model = Of(call)
    check(call, exported(model), model)


@pytest.mark.parametrize("call", [call for call in representatives() if str(call).endswith("1d")], ids=str)
def test_every_operator_is_plain_with_dynamic_sizes(call: Call) -> None:
    model = Of(call)
    check(call, exported(model, dynamic=True), model)


class Recorded(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func)
        return func(*args, **(kwargs or {}))


def test_the_context_holds_for_its_own_calls_alone() -> None:
    operator = operators["deform_sample"]
    args = [torch.randn(1, 2, 5), torch.rand(1, 1, 3, 1), 0, 0]
    with Recorded() as within, decomposed():
        operator(*args)
    with Recorded() as after:
        operator(*args)
    assert [operator.overload in recorded.called for recorded in (within, after)] == [False, True]


@pytest.mark.filterwarnings("ignore")
def test_executorch() -> None:
    exir = pytest.importorskip("executorch.exir")
    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    model = Of(next(call for call in representatives() if str(call) == "deform_conv-2d"))
    buffer = exir.to_edge(exported(model)).to_executorch().buffer
    (found,) = runtime.load_program(buffer).load_method("forward").execute(model.values)
    assert torch.allclose(found, model(*model.values), atol=1e-5)
