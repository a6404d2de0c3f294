"""``deformkit.export.decomposed``: models in plain operations, for runtimes that do not know deformkit."""

from typing import Any

import pytest
import torch
from rooms import CALLS, Call, Of, representatives
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deformkit as dk
from deformkit._testing import assert_close
from deformkit.export import decomposed
from deformkit.ops._operator import operators

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
# What other runtimes do by plain numbers alone.
BY_NUMBERS = (torch.ops.aten.clamp.default, torch.ops.aten.split_with_sizes.default)


class Recorded(TorchDispatchMode):
    """The operators that are called, and the most axes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[Any] = set()
        self.most_axes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.called.add(func)
        self.most_axes = max([self.most_axes, *(t.dim() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def check_plain(called: set[Any]) -> None:
    assert not [str(f) for f in called if f.namespace != "aten" or any(name in str(f) for name in MISSING)]


@pytest.mark.parametrize("call", representatives(), ids=str)
def test_every_operator_is_plain(call: Call) -> None:
    args = call.arguments(torch.float32)
    with torch.no_grad():
        expected = call.operator(*args)
        with Recorded() as recorded, decomposed():
            found = call.operator(*args)
    check_plain(recorded.called)
    assert recorded.called and recorded.most_axes <= max(5, expected.dim())
    assert_close(found, call.operator.reference(*call.arguments(torch.float64)), expected)


def exported(model: Of, **options: Any) -> torch.export.ExportedProgram:
    with torch.no_grad(), decomposed():
        return torch.export.export(model.eval(), model.values, **options)


@pytest.mark.parametrize("name", ["deform_conv-1d", "deform_roi_pool-1d", "deform_splat-1d", "ms_deform_attn-1d"])
def test_programs_with_dynamic_sizes(name: str) -> None:
    model = Of(next(call for call in representatives() if str(call) == name))
    auto = tuple({axis: torch.export.Dim.AUTO for axis in range(value.dim())} for value in model.values)
    program = exported(model, dynamic_shapes=(auto,))
    check_plain({n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)})
    sizes = {n for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt | torch.SymFloat)}
    assert all(isinstance(n.meta["val"], torch.SymInt) for n in sizes), "half of a size is no size"
    assert not [n for n in program.graph.nodes if n.target in BY_NUMBERS and sizes.intersection(n.all_input_nodes)]
    assert all(value.numel() <= 64 for value in program.constants.values() if isinstance(value, Tensor))
    assert torch.allclose(program.module()(*model.values), model(*model.values), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", [torch.export.export, torch.jit.trace])
def test_a_number_of_operations_that_depends_on_values_is_not_traced(trace: Any) -> None:
    model = Of(next(call for call in CALLS if str(call) == "deform_roi_pool-1d-adaptive")).eval()
    with decomposed():
        found = model(*model.values)
        with pytest.raises(ValueError, match="sampling_ratio is 0; in a model of plain operations"):
            trace(model, model.values)
    assert torch.allclose(found, model(*model.values), atol=1e-5)


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


class Reflected(nn.Module):
    def forward(self, input: Tensor, points: Tensor) -> Tensor:
        return dk.deform_sample(input, points, boundary="reflect")


def test_reflection_does_not_limit_dynamic_sizes() -> None:
    batch, width, count = (torch.export.Dim(name) for name in ("batch", "width", "count"))
    shapes = ({0: batch, 2: width}, {0: batch, 2: count})
    with torch.no_grad(), decomposed():
        program = torch.export.export(
            Reflected(), (torch.randn(2, 4, 9), torch.randn(2, 1, 5, 1)), dynamic_shapes=shapes
        )
    values = torch.randn(3, 4, 19), torch.randn(3, 1, 6, 1) * 40
    assert torch.allclose(program.module()(*values), Reflected()(*values), atol=1e-5)
