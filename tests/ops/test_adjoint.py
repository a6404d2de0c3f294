"""Operators that are adjoints of others: <u, F(x)> = <A(u), x>, and what follows from it."""

import random
from typing import Any

import hypothesis.strategies as st
import pytest
import random_calls
import torch
from hypothesis import given, settings
from rooms import CALLS, Call, check, check_bits, needs_kernel
from torch import Tensor

from deformkit._testing import assert_close
from deformkit.ops._operator import operators
from deformkit.ops._shape import CHOICES, name_of
from deformkit.ops.deform_conv_transpose.cases import Case as Transpose
from deformkit.ops.deform_correlate.cases import Case as Correlate

ADJOINTS = [name for name, operator in operators.items() if operator.partner and not name.endswith("_backward")]
laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)

LARGE = [
    Transpose("planes", 2, 6, (40, 33), 4, (3, 3), stride=2, padding=1, groups=2, offset_groups=2),
    Transpose("products", 2, 24, (12, 13), 40, (4, 4), stride=2, padding=1),
    Transpose("groups across slices", 2, 14, (9, 17), 72, (3, 3), stride=2, padding=1, groups=2, offset_groups=3),
    Transpose("large weight", 1, 720, (5, 6), 40, (3, 3), padding=1),
    Transpose("few points", 1, 3, (4_000,), 4, (2,), stride=160, offset_std=1e4, boundary="border"),
    Transpose("windows", 1, 3, (80_100,), 4, (5,), stride=8, offset_std=1e4, boundary="border"),
    Transpose("depthwise", 1, 16, (300,), 16, (3,), stride=2, groups=16, offset_groups=16),
    Correlate("few heads", 1, ((31, 29), (9, 9)), 900, 1, 40, (9, 4)),
    Correlate("many heads", 3, ((20, 21),), 150, 8, 16, (5,)),
]


def partner_arguments(name: str, args: dict[str, Any], x: Tensor) -> list[Any]:
    """The arguments of F at x, from those of its adjoint by name."""
    if name == "deform_conv_transpose":
        return operators["deform_conv"].ordered({**args, "input": x, "bias": None})
    if name == "deform_correlate":
        return operators["ms_deform_attn"].ordered({**args, "value": args["key"], "attention_weights": x})
    if name == "deform_splat":
        return operators["deform_sample"].ordered({**args, "input": x, "mode": "linear"})
    raise AssertionError(f"{name} has no entry here")


@pytest.mark.parametrize("name", ADJOINTS)
def test_the_scalar_products_are_equal(name: str) -> None:
    @laws
    @given(st.integers(0, 2**31 - 1))
    def law(seed: int) -> None:
        torch.manual_seed(seed)
        call = random_calls.GENERATORS[name](random.Random(seed))
        args = [v.double().nan_to_num(0.25, 3e9, -3e9) if isinstance(v, Tensor) else v for v in call.args]
        named = dict(zip(operators[name].arguments, args, strict=True))
        for choice in CHOICES.keys() & named.keys():
            named[choice] = name_of(choice, named[choice])
        result = operators[name](*args)
        x = torch.randn_like(result)
        partner = operators[operators[name].partner](*partner_arguments(name, named, x))
        assert partner.shape == args[0].shape
        products, others = result * x, partner * args[0]
        magnitude = products.abs().sum() + others.abs().sum()
        # Beside the sum of the magnitudes, which is what rounding goes by: the two may cancel to nothing.
        assert_close(products.sum() - others.sum() + magnitude, magnitude)

    law()


@pytest.mark.parametrize("name", ADJOINTS)
def test_gradients_need_no_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gradients are those of the kernels of F."""

    def fail(*args: Any) -> None:
        raise AssertionError("the reference was called")

    call = next(call for call in CALLS if call.operator.name == name)
    expected = call.backward_operator.reference(*(args := call.backward_arguments(call.arguments(torch.float64))))
    for operator in (name, operators[name].partner):
        for suffix in ("", "_backward"):
            monkeypatch.setattr(operators[operator + suffix], "reference", fail)
    for one, other in zip(call.backward_operator(*args), expected, strict=True):
        assert_close(one, other)


def large(case: Any) -> Call:
    return Call(operators["deform_conv_transpose" if isinstance(case, Transpose) else "deform_correlate"], case)


each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)


@needs_kernel("deform_conv_transpose")
@each_large
def test_same_bits_at_any_number_of_threads(case: Any) -> None:
    call = large(case)
    check_bits(call, call.arguments())
    check_bits(call, call.arguments(torch.bfloat16))


@each_large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(case: Any, dtype: torch.dtype) -> None:
    call = large(case)
    check(call, call.arguments(dtype))


@each_large
def test_some_of_the_gradients(case: Any) -> None:
    """What F gives for the gradient by u comes from the walk that computes its gradients, or from F alone."""
    call = large(case)
    *args, mask = call.backward_arguments(call.arguments(torch.float64))
    together = call.backward_operator(*args, mask)
    count = len(mask)
    for asked in [[i == j for i in range(count)] for j in range(count)] + [[i < 2 for i in range(count)]]:
        for yes, one, other in zip(asked, call.backward_operator(*args, asked), together, strict=True):
            if yes:
                assert_close(one, other)
            else:
                assert one.numel() == 0


@pytest.mark.parametrize("name", ADJOINTS)
def test_coordinates_without_a_number_show_in_the_gradients(name: str) -> None:
    call = next(call for call in CALLS if call.operator.name == name and call.case.axes == 2)
    args = call.arguments()
    for i in call.operator.coordinates:
        args[i].flatten()[::7] = torch.nan
        args[i].flatten()[3::11] = torch.inf
    check(call, args)
