"""The short way of a call below autograd: the same result, and nothing that the dispatcher would do is left out.

Autocast is a part of it, which test_contract.py checks.
"""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from rooms import CALLS, Call, representatives
from torch import Tensor

from deformkit._testing import evaluate

one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)


@one_call_each
def test_the_short_way_computes_what_the_dispatcher_does(call: Call) -> None:
    """A call of the operator goes below autograd, past what torch.library registers for the overload."""
    args = call.arguments()
    positions = call.positions(args)
    short, registered = (evaluate(f, args, positions, torch.float32) for f in (call.operator, call.operator.overload))
    assert all(torch.equal(one, other) for one, other in zip(short, registered, strict=True))
    leaves = [v.requires_grad_() if i in positions else v for i, v in enumerate(args)]
    node = call.operator(*leaves).grad_fn
    assert type(node).__name__ == f"{call.operator.name}Backward"  # as anomaly detection prints it
    with torch.no_grad():
        assert not call.operator(*leaves).requires_grad
    with torch.inference_mode():
        assert call.operator(*leaves).is_inference()


@one_call_each
def test_a_kernel_is_asked_before_the_check(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a public function takes as long as a small call; it only says why a kernel refused."""
    args = call.arguments()
    expected = call.operator(*args)

    def check(*args: Any, **known: Any) -> None:
        raise ValueError(f"checked with {known}")

    monkeypatch.setattr(call.operator, "check", check)
    assert torch.equal(call.operator.checked_call(*args, axes=3), expected)
    with pytest.raises(ValueError, match=r"checked with \{'axes': 3\}") as raised:
        call.operator.checked_call(args[0].to(torch.int16), *args[1:], axes=3)
    assert raised.value.__suppress_context__


@one_call_each
def test_what_the_check_cannot_explain_is_raised_as_it_is(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("out of memory")

    def run(args: Any) -> None:
        raise failure

    monkeypatch.setattr(call.operator, "_short_way", run)
    with pytest.raises(RuntimeError) as raised:
        call.operator.checked_call(*call.arguments())
    assert raised.value is failure


@one_call_each
def test_an_error_keeps_no_tensor_alive(call: Call) -> None:
    """Not until the garbage collector runs, when memory may be what was short."""
    args = call.arguments()
    wrong = args[0].to(torch.int16)
    alive = weakref.ref(wrong)
    gc.disable()
    try:
        with contextlib.suppress(TypeError):
            call.operator.checked_call(wrong, *args[1:])
        del wrong
        assert alive() is None
    finally:
        gc.enable()


class Doubled(Tensor):
    """A subclass that doubles what a function returns."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return 2 * result if func in {call.operator.overload for call in CALLS} else result


class Doubling(torch.overrides.TorchFunctionMode):
    """A mode that does the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Doubled.__torch_function__(func, types, args, kwargs)


@one_call_each
def test_autograd_records_what_modes_and_subclasses_do(call: Call) -> None:
    args = call.arguments()
    positions = call.positions(args)

    def under_a_mode(*values: Any) -> Tensor:
        with Doubling():
            return call.operator(*values)

    def of_a_subclass(first: Tensor, *rest: Any) -> Tensor:
        return call.operator(first.as_subclass(Doubled), *rest).as_subclass(Tensor)

    expected = [2 * value for value in evaluate(call.operator, args, positions, torch.float32)]
    for function in (under_a_mode, of_a_subclass):
        actual = evaluate(function, args, positions, torch.float32)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@one_call_each
def test_a_mode_sees_a_backward_pass_whose_forward_pass_it_did_not_see(call: Call) -> None:
    args = call.arguments()
    output = call.operator(*[v.requires_grad_() if i in call.positions(args) else v for i, v in enumerate(args)])
    seen: list[Any] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Spy():
        output.sum().backward()
    assert call.backward_operator.overload in seen
