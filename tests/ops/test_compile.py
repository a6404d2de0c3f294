"""Every operator under torch.compile and torch.export, forward and backward."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from rooms import CALLS, Call, double, representatives
from torch import Tensor

from deformkit._testing import assert_close, evaluate
from deformkit.ops._operator import function_of

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)
# What a transform or a backend needs of an operator does not depend on its axes, but the time to compile it does.
one_line_each = pytest.mark.parametrize("call", [c for c in representatives() if c.case.axes == 1], ids=str)
one_plane_each = pytest.mark.parametrize("call", [c for c in representatives() if c.case.axes == 2], ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


class Layer(torch.nn.Module):
    """The operator as a module: it takes the batched arguments and keeps the others."""

    def __init__(self, call: Call, args: list[Any]) -> None:
        super().__init__()
        self.call = call
        self.args = args
        self.given = [i for i in call.operator.batched if args[i] is not None]

    def forward(self, *given: Tensor) -> Tensor:
        full = list(self.args)
        for i, value in zip(self.given, given, strict=True):
            full[i] = value
        return self.call.operator(*full) * 2

    def inputs(self, repeat: int = 1) -> tuple[Tensor, ...]:
        return tuple(torch.cat([self.args[i]] * repeat) for i in self.given)


def check(actual: list[Tensor], call: Call, args: list[Any]) -> None:
    truth = evaluate(lambda *v: call.operator.reference(*v) * 2, double(args), call.positions(args), torch.float32)
    reference = evaluate(lambda *v: call.operator.reference(*v) * 2, args, call.positions(args), torch.float32)
    for results in zip(actual, truth, reference, strict=True):
        assert_close(*results)


@every_call
def test_traces_whole_with_backward(call: Call) -> None:
    args = call.arguments()
    compiled = torch.compile(lambda *v: call.operator(*v) * 2, fullgraph=True, backend="aot_eager")
    check(evaluate(compiled, args, call.positions(args), torch.float32), call, args)


@one_plane_each
def test_compiles_with_inductor(call: Call) -> None:
    args = call.arguments()
    compiled = torch.compile(lambda *v: call.operator(*v) * 2, fullgraph=True)
    check(evaluate(compiled, args, call.positions(args), torch.float32), call, args)


@one_call_each
def test_dynamic_shapes_compile_once(call: Call) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = Layer(call, call.arguments())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for repeat in (7, 3, 5):  # the first differs from all other sizes, which would otherwise share its symbol
        inputs = layer.inputs(repeat)
        leaves = [
            t.requires_grad_() for i, t in zip(layer.given, inputs, strict=True) if i in call.positions(layer.args)
        ]
        output = compiled(*inputs)
        grads = torch.autograd.grad(output.square().sum(), leaves)
        expected = layer(*inputs)
        for one, other in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(output, expected)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3  # 2 if the first call made a real number among the arguments constant


@one_plane_each
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports_as_one_node_with_a_dynamic_batch(call: Call, strict: bool) -> None:
    layer = Layer(call, call.arguments())
    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = layer.inputs(2)
    program = torch.export.export(layer, inputs, dynamic_shapes=((({0: batch},) * len(inputs)),), strict=strict)
    for graph in (program, program.run_decompositions()):
        targets = [node.target for node in graph.graph.nodes if "deformkit" in str(node.target)]
        assert targets == [call.operator.overload]
        for repeat in (1, 3):
            assert torch.equal(graph.module()(*layer.inputs(repeat)), layer(*layer.inputs(repeat)))


# The derivatives of an adjoint are calls of its partner, for every adjoint in the same way.
@pytest.mark.parametrize(
    "call",
    [c for c in representatives() if c.case.axes == 1 and (c.operator.gpu or c.operator.name == "deform_splat")],
    ids=str,
)
def test_compiled_transforms(call: Call) -> None:
    args = call.arguments(torch.float64)
    positions = call.positions(args)
    values = tuple(args[i] for i in positions)
    directions = tuple(call.arguments(torch.float64, seed=1)[i] for i in positions)

    def transforms(function: Any) -> dict[str, Any]:
        def loss(*values: Tensor) -> Tensor:
            return function_of(function, args, positions)(*values).square().mean()

        gradient = torch.func.grad(loss, argnums=tuple(range(len(values))))

        def along(*values: Tensor) -> Any:
            return torch.func.jvp(loss, values, directions)

        def per_sample(*values: Tensor) -> Any:  # which compiles the gradient, too
            return torch.func.vmap(gradient)(*(torch.stack([v, 2 * v]) for v in values))

        return {"jvp": along, "per sample": per_sample}

    truth = transforms(call.operator.reference)
    for name, function in transforms(call.operator).items():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = torch.utils._pytree.tree_leaves(compiled(*values))
        expected = torch.utils._pytree.tree_leaves(truth[name](*values))
        for one, other in zip(results, expected, strict=True):
            assert other.any()
            assert_close(one, other, name=f"compiled {name}")


@one_line_each
def test_compiled_vmap_keeps_the_operator(call: Call) -> None:
    counter = torch._dynamo.testing.EagerAndRecordGraphs()
    layer, other = (Layer(call, call.arguments(torch.float64, seed)) for seed in range(2))
    stacked = [torch.stack(pair) for pair in zip(layer.inputs(), other.inputs(), strict=True)]
    compiled = torch.compile(torch.func.vmap(layer), fullgraph=True, backend=counter)
    truth = torch.stack([layer(*layer.inputs()), layer(*other.inputs())])
    assert_close(compiled(*stacked), truth)
    assert "deformkit" in counter.graphs[0].code


@one_call_each
def test_compiled_under_autocast(call: Call) -> None:
    args = call.arguments()

    def function(*values: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call.operator(*values)

    expected = evaluate(function, args, call.positions(args), torch.bfloat16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(evaluate(compiled, args, call.positions(args), torch.bfloat16), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
