"""The contract for calls with CUDA tensors, and, on any machine, for calls with tensors on two devices."""

from typing import Any

import pytest
import torch
from rooms import CALLS, Call, double, public, representatives
from torch import Tensor

from deformkit._testing import assert_close, assert_equal, evaluate

one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)
flat_call_each = pytest.mark.parametrize("call", [c for c in representatives() if c.case.axes == 2], ids=str)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on(device: str, args: list[Any]) -> list[Any]:
    return [v.to(device) if isinstance(v, Tensor) else v for v in args]


def cpu(results: list[Tensor]) -> list[Tensor]:
    return [result.cpu() for result in results]


def assert_right(results: list[Tensor], call: Call, args: list[Any], dtype: torch.dtype) -> None:
    """Compare output and gradients on any device with those of the reference on the CPU."""
    truth = evaluate(call.operator.reference, double(args), call.positions(args), dtype)
    reference = evaluate(call.operator.reference, args, call.positions(args), dtype)
    for one, *others in zip(cpu(results), truth, reference, strict=True):
        assert_close(one, *others)


class TestOnCuda:
    pytestmark = gpu

    @pytest.fixture(autouse=True, params=[False, True], ids=["atomics", "deterministic"])
    def deterministic(self, request: pytest.FixtureRequest) -> None:
        torch.use_deterministic_algorithms(request.param)

    @one_call_each
    def test_value_and_gradients(self, call: Call, dtype: torch.dtype) -> None:
        args = call.arguments(dtype)
        results = evaluate(call.operator, on("cuda", args), call.positions(args), dtype)
        assert all(result.is_cuda for result in results)
        assert_right(results, call, args, dtype)

    @flat_call_each
    def test_compiles_with_inductor(self, call: Call) -> None:
        torch.compiler.reset()
        args = call.arguments()
        compiled = torch.compile(lambda *v: call.operator(*v) * 1, fullgraph=True)
        results = evaluate(compiled, on("cuda", args), call.positions(args), torch.float32)
        assert_right(results, call, args, torch.float32)

    @flat_call_each
    def test_opcheck(self, call: Call) -> None:
        args = on("cuda", call.arguments())
        torch.library.opcheck(call.operator.overload, tuple(args))
        torch.library.opcheck(call.backward_operator.overload, tuple(on("cuda", call.backward_arguments(args))))

    @flat_call_each
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_autocast_leaves_coordinates_alone(self, call: Call, half: torch.dtype) -> None:
        args = call.arguments()

        def under_autocast(*values: Any) -> Tensor:
            with torch.autocast("cuda", dtype=half):
                return call.operator(*values)

        cast = [
            v.to(half) if isinstance(v, Tensor) and v.is_floating_point() and i not in call.operator.coordinates else v
            for i, v in enumerate(args)
        ]
        actual, expected = (
            evaluate(function, on("cuda", values), call.positions(args), half)
            for function, values in ((under_autocast, args), (call.operator, cast))
        )
        assert actual[0].dtype == half and all(grad.dtype == torch.float32 for grad in actual[1:])
        for one, truth in zip(cpu(actual), cpu(expected), strict=True):
            assert_close(one.to(half), truth.double(), truth.to(half))

    @one_call_each
    def test_a_captured_graph_follows_its_inputs(self, call: Call) -> None:
        args = on("cuda", call.arguments())
        leaves = [args[i].requires_grad_() for i in call.positions(args)]
        cotangent = torch.randn_like(call.operator(*args))

        def run() -> list[Tensor]:
            output = call.operator(*args)
            return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        other = call.arguments(seed=1)
        with torch.no_grad():
            for i in call.positions(args):
                args[i].copy_(other[i])
        graph.replay()
        names = [call.operator.arguments[i] for i in call.positions(args)]
        for name, replayed, expected in zip(["output", *names], cpu(kept), cpu(run()), strict=True):
            assert_close(replayed, expected.double(), expected, name)

    @one_call_each
    def test_on_a_stream_of_its_own(self, call: Call) -> None:
        args = on("cuda", call.arguments())
        expected = call.operator(*args)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = call.operator(*args)
        stream.synchronize()
        assert_equal(result, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    @flat_call_each
    def test_on_another_device_than_the_current(self, call: Call) -> None:
        args = call.arguments()
        results = evaluate(call.operator, on("cuda:1", args), call.positions(args), torch.float32)
        assert torch.cuda.current_device() == 0
        assert all(result.get_device() == 1 for result in results)
        assert_right(results, call, args, torch.float32)


class TestManyRunsOnCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("call", CALLS, ids=str)
    def test_deterministic_runs_have_the_same_bits(self, call: Call) -> None:
        args = on("cuda", call.backward_arguments(call.arguments()))
        first = call.backward_operator(*args)
        for _ in range(9):
            for one, other in zip(first, call.backward_operator(*args), strict=True):
                assert_equal(one, other)

    @flat_call_each
    def test_nothing_is_kept(self, call: Call) -> None:
        args = on("cuda", call.arguments())
        positions = call.positions(args)
        evaluate(call.operator, args, positions, torch.float32)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            evaluate(call.operator, args, positions, torch.float32)
        assert torch.cuda.memory_allocated() == before


# Wrong calls have the same messages on CUDA or meta as on the CPU

ELSEWHERE = ["meta", pytest.param("cuda", marks=gpu)]


def refusal(call: Call, args: list[Any]) -> tuple[type[Exception], str]:
    """The error of the public function for a call."""
    function, named = public(call, args)
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**named)
    return caught.type, str(caught.value)


def tensors_after_the_first(call: Call, args: list[Any]) -> list[int]:
    return [i for i in call.operator.tensors[1:] if args[i] is not None]


@one_call_each
@pytest.mark.parametrize("device", ELSEWHERE)
def test_a_tensor_on_another_device_is_named(call: Call, device: str) -> None:
    args = call.arguments()
    for i in tensors_after_the_first(call, args):
        error, message = refusal(call, [v if j == i else on(device, [v])[0] for j, v in enumerate(args)])
        assert error is ValueError
        assert message.startswith(f"{call.operator.arguments[i]} is on cpu; it must be on {device}")


@one_call_each
@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("wrong", [torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_wrong_dtypes_have_the_same_errors(call: Call, device: str, wrong: torch.dtype) -> None:
    """Mixed dtypes, half-precision locations and integers are errors; offsets may be in half precision."""
    args = call.arguments()
    for i in tensors_after_the_first(call, args):
        allowed = wrong == torch.bfloat16 and call.operator.arguments[i] == "offset"
        if not allowed:
            mixed = [v.to(wrong) if j == i else v for j, v in enumerate(args)]
            here = refusal(call, mixed)
            assert here == refusal(call, on(device, mixed))
            assert here[0] is TypeError and call.operator.arguments[i] in here[1]


@one_call_each
@pytest.mark.parametrize("device", ELSEWHERE)
def test_wrong_shapes_have_the_same_errors(call: Call, device: str) -> None:
    args = call.arguments()
    for i in tensors_after_the_first(call, args):
        doubled = [torch.cat([v, v], -1) if j == i else v for j, v in enumerate(args)]
        here = refusal(call, doubled)
        assert here == refusal(call, on(device, doubled))
