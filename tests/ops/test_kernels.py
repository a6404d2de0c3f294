"""Every kernel is compared with the reference, for every case of every operator."""

from itertools import product
from typing import Any

import pytest
import torch
from rooms import CALLS, LAYOUTS, Call, check, check_bits, double, representatives
from torch import Tensor

from deformkit._testing import assert_close, assert_equal

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)


@every_call
def test_value_and_gradients(call: Call, dtype: torch.dtype) -> None:
    for seed in range(3):
        check(call, call.arguments(dtype, seed))


@every_call
def test_same_bits_at_any_number_of_threads(call: Call, dtype: torch.dtype) -> None:
    check_bits(call, call.arguments(dtype))


@every_call
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_values_with_float32_coordinates(call: Call, half: torch.dtype) -> None:
    args, precise = call.arguments(half), call.arguments(torch.float32)
    for i in call.operator.coordinates:
        args[i] = precise[i]
    check(call, args)


@every_call
def test_float32_values_with_half_coordinates(call: Call) -> None:
    args = call.arguments(torch.float32)
    for i in call.operator.coordinates:
        args[i] = args[i] if args[i] is None else args[i].to(torch.bfloat16)
    try:
        call.operator(*(v.to("meta") if isinstance(v, Tensor) else v for v in args))
    except TypeError as refusal:
        assert any(
            f"{call.operator.arguments[i]} has dtype torch.bfloat16" in str(refusal) for i in call.operator.coordinates
        )
        return
    check(call, args)


@one_call_each
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_any_layout(call: Call, layout: Any, dtype: torch.dtype) -> None:
    check(call, [layout(v) if isinstance(v, Tensor) else v for v in call.arguments(dtype)])


@one_call_each
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
def test_cotangent_of_any_layout(call: Call, layout: Any) -> None:
    grad, *args = call.backward_arguments(call.arguments())
    grad = layout(grad)
    truth = call.backward_operator.reference(grad.double(), *double(args))
    reference = call.backward_operator.reference(grad, *args)
    for results in zip(call.backward_operator(grad, *args), truth, reference, strict=True):
        assert_close(*results, name=f"gradient for a cotangent with strides {grad.stride()}")


@one_call_each
def test_gradients_only_where_asked(call: Call) -> None:
    grad, *args, possible = call.backward_arguments(call.arguments())
    truth = call.backward_operator.reference(grad.double(), *double(args), possible)
    reference = call.backward_operator.reference(grad, *args, possible)
    for asked in product((False, True), repeat=len(possible)):
        if any(yes and not may for yes, may in zip(asked, possible, strict=True)):
            continue
        for i, result in enumerate(call.backward_operator(grad, *args, list(asked))):
            if asked[i]:
                assert_close(result, truth[i], reference[i], f"gradient {i}, asked {asked}")
            else:
                assert result.numel() == 0


@every_call
def test_nothing_is_left_unwritten(call: Call, dtype: torch.dtype) -> None:
    args = call.arguments(dtype)
    assert torch.empty(1).isnan()
    for result in (call.operator(*args), *call.backward_operator(*call.backward_arguments(args))):
        assert result.isfinite().all()


@every_call
def test_arguments_are_left_alone(call: Call) -> None:
    args = call.arguments()
    before = [v.clone() if isinstance(v, Tensor) else v for v in args]
    backward = call.backward_arguments(args)
    cotangent = backward[0].clone()
    call.backward_operator(*backward)
    assert_equal(backward[0], cotangent)
    for now, then in zip(args, before, strict=True):
        if isinstance(now, Tensor):
            assert_equal(now, then)


@every_call
def test_inference_mode_and_no_grad(call: Call) -> None:
    args = call.arguments()
    expected = call.operator(*args)
    with torch.inference_mode():
        assert_equal(call.operator(*args), expected)
    for i in call.positions(args):
        args[i].requires_grad_()
    with torch.no_grad():
        result = call.operator(*args)
    assert not result.requires_grad
    assert_equal(result, expected)
    assert_equal(call.operator(*args).detach(), expected)
