"""The Triton kernels of every operator are compared with the reference, in the interpreter of Triton or on a GPU."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle, product
from typing import Any, NamedTuple

import fuzz
import pytest
import random_calls
import torch
from rooms import CALLS, LAYOUTS, Call, check, double, representatives
from torch import Tensor

from deformkit._testing import assert_close, assert_equal
from deformkit.ops._operator import operators

pytest.importorskip("triton")

import triton
import triton.language as tl
import triton_kernels
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError

from deformkit.ops.gpu import launch

FLAT = [call for call in representatives() if call.case.axes < 3]
# An adjoint is computed by the kernels of its partner, and has no field among its arguments.
OWN = [call for call in FLAT if call.operator.gpu]
PLANE = [call for call in FLAT if call.case.axes == 2]
WIDEST = [
    max((call for call in CALLS if call.operator is operator), key=lambda call: call.case.channels)
    for operator in dict.fromkeys(call.operator for call in CALLS if call.operator.gpu)
]
every_call = pytest.mark.parametrize("call", CALLS, ids=str)
one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)
# Without volumes, which are slow in the interpreter because of their eight corners.
one_flat_call_each = pytest.mark.parametrize("call", FLAT, ids=str)
one_plane_each = pytest.mark.parametrize("call", PLANE, ids=str)


@pytest.fixture(autouse=True)
def _triton(_kernels: None, request: pytest.FixtureRequest) -> Iterator[None]:
    if request.config.getoption("--kernels") != "cpu":
        yield
    else:
        with triton_kernels.instead_of_cpp():
            yield


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> bool:
    """The two ways in which the gradient of a field is accumulated."""
    torch.use_deterministic_algorithms(request.param)
    return request.param


@pytest.mark.parametrize("name", [name for name in operators if not name.endswith("_backward")])
def test_every_operator_has_kernels(name: str) -> None:
    assert find_spec(f"deformkit.ops.{operators[name].partner or name}.gpu")


@every_call
def test_value_and_gradients(call: Call) -> None:
    torch.use_deterministic_algorithms(False)
    check(call, call.arguments())


@one_call_each
def test_deterministic_gradients(call: Call) -> None:
    check(call, call.arguments())


@one_flat_call_each
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(call: Call, half: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    check(call, call.arguments(half))


@one_flat_call_each
def test_half_values_with_float32_coordinates(call: Call) -> None:
    args, precise = call.arguments(torch.bfloat16), call.arguments()
    for i in call.operator.coordinates:
        args[i] = precise[i]
    check(call, args)


@one_plane_each
@pytest.mark.parametrize("first", range(0, len(LAYOUTS), 3))
def test_any_layout(call: Call, first: int) -> None:
    """Of the arguments and of the cotangent, each in another layout, and each in two of them."""
    layouts = cycle(LAYOUTS[first:] + LAYOUTS[:first])
    args = [next(layouts)(v) if isinstance(v, Tensor) else v for v in call.arguments()]
    assert_close(call.operator(*args), *(call.operator.reference(*a) for a in (double(args), args)), name="output")
    grad, *args = call.backward_arguments(args)
    grad = next(layouts)(grad)
    truth = call.backward_operator.reference(grad.double(), *double(args))
    reference = call.backward_operator.reference(grad, *args)
    for results in zip(call.backward_operator(grad, *args), truth, reference, strict=True):
        assert_close(*results, name=f"gradient for a cotangent with strides {grad.stride()}")


@pytest.mark.parametrize("call", representatives(each_axes=False), ids=str)
def test_gradients_only_where_asked(call: Call, deterministic: bool) -> None:
    grad, *args, possible = call.backward_arguments(call.arguments())
    truth = call.backward_operator.reference(grad.double(), *double(args), possible)
    reference = call.backward_operator.reference(grad, *args, possible)
    for asked in product(*((False, True) if may else (False,) for may in possible)):
        for i, result in enumerate(call.backward_operator(grad, *args, list(asked))):
            if asked[i]:
                assert_close(result, truth[i], reference[i], f"gradient {i}, asked {asked}")
            else:
                assert result.numel() == 0


@pytest.mark.parametrize("call", WIDEST, ids=str)
def test_many_small_tiles(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks far smaller than the sizes: rows and channels span several blocks, and the last one is partial."""
    start, started = launch.start, []

    def start_small(kernel: Any, programs: Any, arguments: Any, config: Any) -> None:
        blocks = {name: min(size, 16) for name, size in config.kwargs.items()}
        started.append(programs(blocks) > programs(config.kwargs))
        start(kernel, programs, arguments, launch.Config(blocks, config.num_warps, config.num_stages))

    monkeypatch.setattr(launch, "start", start_small)
    check(call, call.arguments())
    assert any(started)


@one_flat_call_each
def test_deterministic_gradients_do_not_depend_on_order(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    args = call.backward_arguments(call.arguments())
    there = call.backward_operator(*args)
    if triton_kernels.interpreting():
        monkeypatch.setattr(*triton_kernels.last_program_first())
    for one, other in zip(there, call.backward_operator(*args), strict=True):
        assert_equal(one, other)


@one_flat_call_each
def test_special_coordinates(call: Call, deterministic: bool) -> None:
    args = call.arguments()
    for i in call.operator.coordinates:
        if args[i] is not None and call.operator.arguments[i] != "rois":
            wild = torch.tensor((*random_calls.WILD, torch.nan))
            values = wild[torch.randint(len(wild), args[i].shape)]
            args[i] = torch.where(torch.rand(args[i].shape) < 0.2, values, args[i])
    check(call, args)


@pytest.mark.parametrize("call", OWN, ids=str)
def test_an_undefined_field_shows_where_it_is_read(call: Call, deterministic: bool) -> None:
    args = call.arguments()
    args[0].flatten()[:: args[0].numel() // 3] = torch.nan
    check(call, args)


def test_random_calls() -> None:
    counts = fuzz.run(25, seed=10_000, compare_every=1)
    assert counts["compared"] > 15


@triton.jit
def scaled(output: Any, number: Any) -> None:
    tl.store(output, number * 1048576)


def test_an_integer_that_does_not_fit_is_an_error() -> None:
    """As every test here relies on: on a GPU an index that is too large wraps around."""
    if not triton_kernels.interpreting():
        pytest.skip("a GPU computes what the interpreter refuses")
    output = torch.zeros(1, dtype=torch.int64)
    with triton_kernels.integers_that_fit():
        scaled[(1,)](output, 2047)
        assert output.item() == 2047 * 2**20
        with pytest.raises(InterpreterError, match="mul exceeds int32: 2147483648 to 2147483648"):
            scaled[(1,)](output, 2048)


class Total(NamedTuple):
    """A sum to which a kernel adds, like the gradient of a field."""

    value: Tensor

    def zero_(self) -> None:
        self.value.zero_()


@triton.jit
def count(output, total, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(output, ROWS)
    tl.atomic_add(total.value, 1.0)


def test_autotuning_chooses_the_fastest_and_does_not_change_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton_kernels.interpreting():
        pytest.skip("what is timed here are kernels in the interpreter")
    timed, configs = [], [launch.Config({"ROWS": rows}) for rows in (16, 32, 64)]
    output = torch.zeros(1)

    def bench(kernel_call: Any, quantiles: Any) -> list[float]:
        kernel_call()
        kernel_call()
        timed.append(int(output))
        return [abs(timed[-1] - 32)] * 3

    monkeypatch.setattr(Autotuner, "do_bench", staticmethod(bench))
    monkeypatch.setattr(launch, "_tuners", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    capturing = False

    def chosen(size: int = 1) -> int:
        total = torch.zeros(size)
        launch.launch(count, total.device, lambda blocks: 1, configs, output=output, total=Total(total))
        assert total.sum() == 1
        return int(output)

    assert chosen() == 16 and not timed
    capturing = True
    with launch.autotune():
        assert chosen() == 16 and not timed
        capturing = False
        assert chosen() == 32 and timed == [16, 32, 64]
    assert chosen() == 32
    assert chosen(size=1000) == 16 and timed == [16, 32, 64]
