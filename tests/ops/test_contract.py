"""The contract of every operator with PyTorch, forward and backward: the checks that take well under a second."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rooms import CALLS, Call, double, has_kernel, representatives
from torch import Tensor
from torch.autograd import forward_ad

from deformkit._testing import assert_close, evaluate
from deformkit.ops._operator import function_of, operators

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
one_call_each = pytest.mark.parametrize("call", representatives(), ids=str)


def at(args: list[Any], positions: list[int]) -> list[Any]:
    return [args[i] for i in positions]


def assert_all_close(actual: Any, truth: Any) -> None:
    """Compare two nested structures of float64 tensors by the tolerance rule."""
    actual, truth = (torch.utils._pytree.tree_leaves(nest) for nest in (actual, truth))
    assert len(actual) == len(truth) > 0
    for i, (one, other) in enumerate(zip(actual, truth, strict=True)):
        assert_close(one, other, name=f"result {i}")


def test_every_operator_has_cases() -> None:
    assert {call.operator.name for call in CALLS} == {name for name in operators if not name.endswith("_backward")}


@pytest.mark.parametrize("name", operators)
def test_cpu_kernel_is_loaded(name: str) -> None:
    assert has_kernel(name), "without its kernel an operator is compared with itself: make build"


@pytest.mark.parametrize("name", operators)
def test_no_argument_is_a_string(name: str) -> None:
    """Each string that torch's stable ABI hands to a kernel allocates memory that nobody frees."""
    assert "str" not in {str(argument.type) for argument in operators[name].overload._schema.arguments}


def opcheck(overload: Any, args: Sequence[Any], dynamic: bool) -> None:
    """torch's own, whose traced sizes are symbols only if ``dynamic``: they take up to ten times as long."""
    traced = "test_aot_dispatch_dynamic" if dynamic else "test_aot_dispatch_static"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", traced)
    torch.library.opcheck(overload, tuple(args), test_utils=checks)


# Every call is traced whole in test_compile.py.
@one_call_each
def test_opcheck_forward(call: Call) -> None:
    args, dynamic = call.arguments(), call.case.axes == 2
    opcheck(call.operator.overload, args, dynamic)
    for i in call.positions(args):
        args[i].requires_grad_()
    opcheck(call.operator.overload, args, dynamic)


@one_call_each
def test_opcheck_backward(call: Call) -> None:
    args, dynamic = call.backward_arguments(call.arguments()), call.case.axes == 2
    opcheck(call.backward_operator.overload, args, dynamic)
    opcheck(call.backward_operator.overload, (*args[:-1], [False] * len(args[-1])), dynamic)


@pytest.mark.parametrize("call", representatives(each_axes=False), ids=str)
def test_opcheck_double_backward(call: Call) -> None:
    args = call.backward_arguments(call.arguments())
    for i in (0, *(1 + p for p in call.positions(args[1:]))):
        args[i].requires_grad_()
    # One formula serves all operators, and that of the adjoints calls it. Dynamic sizes make this test slow.
    opcheck(call.backward_operator.overload, args, dynamic=call.operator.name == "deform_conv")


@every_call
def test_gradcheck(call: Call) -> None:
    args = call.arguments(torch.float64)
    positions = call.positions(args)
    values = [args[i].requires_grad_() for i in positions]
    assert torch.autograd.gradcheck(
        function_of(call.operator, args, positions), values, fast_mode=True, check_batched_grad=True
    )


@one_call_each
def test_gradgradcheck(call: Call) -> None:
    args = call.arguments(torch.float64)
    positions = call.positions(args)
    values = [args[i].requires_grad_() for i in positions]
    assert torch.autograd.gradgradcheck(function_of(call.operator, args, positions), values, fast_mode=True)


@every_call
def test_second_gradients_are_those_of_the_reference(call: Call) -> None:
    args = call.arguments(torch.float64)
    positions = call.positions(args)

    def second(function: Any) -> list[Tensor]:
        values = [v.detach().requires_grad_() for v in at(args, positions)]
        output = function_of(function, args, positions)(*values)
        first = torch.autograd.grad(output.square().sum(), values, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), values))

    assert_all_close(second(call.operator), second(call.operator.reference))


@every_call
def test_deterministic_algorithms_and_alerts(call: Call) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    args = call.arguments()
    once, again = (evaluate(call.operator, args, call.positions(args), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@every_call
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_leaves_coordinates_alone(call: Call, half: torch.dtype) -> None:
    args = call.arguments()
    positions = call.positions(args)
    coordinates = [i for i in call.operator.coordinates if args[i] is not None]
    seen: list[torch.dtype] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is call.operator.overload:
                seen.extend(args[i].dtype for i in coordinates)
            return function(*args, **(kwargs or {}))

    def under_autocast(*values: Any) -> Tensor:
        with torch.autocast("cpu", dtype=half), Spy():
            return call.operator(*values)

    actual = evaluate(under_autocast, args, positions, half)
    assert seen == [torch.float32] * len(coordinates)
    assert actual[0].dtype == half
    assert all(grad.dtype == torch.float32 for grad in actual[1:])

    cast = [
        v.to(half) if isinstance(v, Tensor) and v.is_floating_point() and i not in coordinates else v
        for i, v in enumerate(args)
    ]
    for one, other in zip(actual, evaluate(call.operator, cast, positions, half), strict=True):
        assert torch.equal(one, other.to(one.dtype))


@one_call_each
def test_autocast_leaves_float64_alone(call: Call) -> None:
    args = call.arguments(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(call.operator(*args), call.operator.reference(*args))


@one_call_each
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_each_argument(call: Call, in_dim: int) -> None:
    args = call.arguments(torch.float64)
    for i in call.positions(args):
        variants = [call.arguments(torch.float64, seed)[i] for seed in range(3)]
        function = function_of(call.operator, args, [i])
        actual = torch.func.vmap(function, in_dims=in_dim, out_dims=in_dim)(torch.stack(variants, in_dim))
        truth = torch.stack([function_of(call.operator.reference, args, [i])(v) for v in variants], in_dim)
        assert_close(actual, truth, name=f"vmap over {call.operator.arguments[i]}")


@one_call_each
def test_vmap_over_all_arguments_and_twice(call: Call) -> None:
    sets = [[call.arguments(torch.float64, 2 * a + b) for b in range(2)] for a in range(3)]
    positions = call.positions(sets[0][0])
    function, reference = (
        function_of(call.operator, sets[0][0], positions),
        function_of(call.operator.reference, sets[0][0], positions),
    )
    stacked = [torch.stack([torch.stack([args[i] for args in row]) for row in sets]) for i in positions]
    truth = torch.stack([torch.stack([reference(*at(args, positions)) for args in row]) for row in sets])
    assert_close(torch.func.vmap(torch.func.vmap(function))(*stacked), truth)
    last = [t.movedim(0, -1) for t in stacked]
    actual = torch.func.vmap(torch.func.vmap(function, in_dims=0), in_dims=-1, randomness="error", chunk_size=2)(*last)
    assert_close(actual, truth)


@one_call_each
def test_vmap_of_the_bare_operator(call: Call) -> None:
    sets = [call.arguments(torch.float64, seed) for seed in range(4)]
    positions = call.positions(sets[0])
    stacked = [torch.stack([args[i] for args in sets]).unflatten(0, (2, 2)) for i in positions]
    function, reference = (
        function_of(f, sets[0], positions) for f in (call.operator.overload, call.operator.reference)
    )
    truth = torch.stack([reference(*at(args, positions)) for args in sets]).unflatten(0, (2, 2))
    assert_close(torch.func.vmap(torch.func.vmap(function))(*stacked), truth)


@one_call_each
def test_vmap_of_backward(call: Call) -> None:
    args = call.backward_arguments(call.arguments(torch.float64))
    operator = call.backward_operator
    for i in (0, *(1 + p for p in call.positions(args[1:]))):
        variants = [args[i] * scale for scale in (1.0, 0.5)]
        actual = torch.func.vmap(function_of(operator, args, [i]))(torch.stack(variants))
        each = [function_of(operator.reference, args, [i])(v) for v in variants]
        assert_all_close(actual, [torch.stack(parts) for parts in zip(*each, strict=True)])


@every_call
def test_func_grad_and_vjp(call: Call) -> None:
    args = call.arguments(torch.float64)
    positions = call.positions(args)
    values = at(args, positions)

    def gradients(function: Any) -> Any:
        loss = function_of(lambda *v: function(*v).square().sum(), args, positions)
        output, pull_back = torch.func.vjp(function_of(function, args, positions), *values)
        return torch.func.grad(loss, argnums=tuple(range(len(positions))))(*values), output, pull_back(output)

    assert_all_close(gradients(call.operator), gradients(call.operator.reference))


@one_call_each
@pytest.mark.parametrize(
    "transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=["jacrev", "jacfwd", "hessian"]
)
def test_jacobian_and_hessian(call: Call, transform: Any) -> None:
    args = call.arguments(torch.float64)
    for i in call.positions(args):
        directions = [call.arguments(torch.float64, seed)[i] for seed in (1, 2, 3)]

        def derivative(function: Any, i: int = i, directions: list[Tensor] = directions) -> Tensor:
            def curve(steps: Tensor) -> Tensor:
                moved = args[i] + sum(step * direction for step, direction in zip(steps, directions, strict=True))
                return function_of(function, args, [i])(moved).sin().flatten()[:5]

            return transform(curve)(torch.zeros(3, dtype=torch.float64))

        truth = derivative(call.operator.reference)
        assert truth.any()
        assert_close(derivative(call.operator), truth, name=f"derivative by {call.operator.arguments[i]}")


@every_call
def test_jvp_is_not_silently_zero(call: Call) -> None:
    args = call.arguments(torch.float64)
    flat = call.operator.coordinates if getattr(call.case, "mode", "linear") == "nearest" else []
    tangents = call.arguments(torch.float64, seed=1)
    for i in call.positions(args):

        def along(function: Any, i: int = i) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(function_of(function, args, [i]), (args[i],), (tangents[i],))

        actual = along(call.operator)
        assert actual[1].any() != (i in flat), f"derivative along {call.operator.arguments[i]}"
        assert_all_close(actual, along(call.operator.reference))

    positions = call.positions(args)
    every = [
        torch.func.jvp(function_of(f, args, positions), tuple(at(args, positions)), tuple(at(tangents, positions)))
        for f in (call.operator, call.operator.reference)
    ]
    assert_all_close(*every)


@every_call
def test_dual_numbers(call: Call) -> None:
    args = call.arguments(torch.float64)
    tangents = call.arguments(torch.float64, seed=1)
    results = []
    for function in (call.operator, call.operator.reference):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(args[i], tangents[i]) for i in call.positions(args)]
            result = forward_ad.unpack_dual(function_of(function, args, call.positions(args))(*duals))
            assert result.tangent is not None
            results.append((result.primal, result.tangent))
    assert_all_close(*results)


@one_call_each
def test_forward_over_reverse_and_reverse_over_forward(call: Call) -> None:
    args = call.arguments(torch.float64)
    tangents = call.arguments(torch.float64, seed=1)
    positions = call.positions(args)
    primals, directions = tuple(at(args, positions)), tuple(at(tangents, positions))

    def mixed(function: Any) -> Any:
        def loss(*values: Tensor) -> Tensor:
            return function_of(function, args, positions)(*values).square().mean()

        numbers = tuple(range(len(positions)))
        forward_over_reverse = torch.func.jvp(torch.func.grad(loss, argnums=numbers), primals, directions)
        reverse_over_forward = torch.func.grad(lambda *v: torch.func.jvp(loss, v, directions)[1], argnums=numbers)
        return forward_over_reverse, reverse_over_forward(*primals)

    assert_all_close(mixed(call.operator), mixed(call.operator.reference))


@one_call_each
def test_per_sample_gradients(call: Call) -> None:
    sets = [call.arguments(torch.float64, seed) for seed in range(3)]
    positions = call.positions(sets[0])
    stacked = [torch.stack([args[i] for args in sets]) for i in positions]

    def per_sample(function: Any, in_dims: tuple[int | None, ...]) -> Any:
        loss = function_of(lambda *v: function(*v).square().sum(), sets[0], positions)
        gradient = torch.func.grad(loss, argnums=tuple(range(len(positions))))
        values = [s if d is not None else s[0] for s, d in zip(stacked, in_dims, strict=True)]
        return torch.func.vmap(gradient, in_dims=in_dims)(*values)

    shared_parameters = tuple(0 if i in call.operator.batched else None for i in positions)
    for in_dims in ((0,) * len(positions), shared_parameters):
        assert_all_close(per_sample(call.operator, in_dims), per_sample(call.operator.reference, in_dims))


@every_call
def test_meta_device_gives_the_shape(call: Call) -> None:
    args = [v.to("meta") if isinstance(v, Tensor) else v for v in call.arguments()]
    output = call.operator(*args)
    expected = call.operator(*call.arguments())
    assert (output.device.type, output.shape, output.dtype) == ("meta", expected.shape, expected.dtype)
    assert output.stride() == expected.stride()


@every_call
def test_one_gradient_alone(call: Call) -> None:
    args = call.arguments(torch.float64)
    for i in call.positions(args):
        alone = evaluate(call.operator, args, [i], torch.float64)
        assert_all_close(alone, evaluate(call.operator.reference, double(args), [i], torch.float64))


one_each = pytest.mark.parametrize("call", representatives(each_axes=False), ids=str)


def scaled(call: Call, args: list[Any]) -> Any:
    """A number that depends on all coordinates through another function."""

    def function(factor: Tensor) -> Tensor:
        values = list(args)
        for i in call.operator.coordinates:
            values[i] = None if args[i] is None else args[i] * factor
        return call.operator(*values).square().sum()

    return function


@one_each
def test_two_forward_levels(call: Call) -> None:
    """torch loses the outer tangent in the jvp of a Function."""
    function, at = scaled(call, call.arguments(torch.float64)), torch.ones((), dtype=torch.float64)
    expected = torch.func.jacfwd(torch.func.jacrev(function))(at)
    assert expected.abs() > 1e-3
    assert_close(torch.func.jacfwd(torch.func.jacfwd(function))(at), expected)


@one_each
def test_functionalize(call: Call) -> None:
    args = call.arguments()
    function = function_of(call.operator, args, [0])
    assert torch.equal(torch.func.functionalize(function)(args[0]), function(args[0]))
    gradient = torch.func.grad(lambda value: function(value).sum())
    assert_close(torch.func.functionalize(gradient)(args[0]), gradient(args[0]).double())


@one_each
def test_vmap_of_none(call: Call) -> None:
    args = call.arguments()
    for i in call.positions(args):
        none = args[i].unsqueeze(0)[:0].requires_grad_()
        found = torch.func.vmap(function_of(call.operator, args, [i]))(none)
        assert found.shape == (0, *call.operator(*args).shape)
        [grad] = torch.autograd.grad(found.sum(), none)
        assert grad.shape == none.shape


@one_each
def test_under_another_default_dtype(call: Call) -> None:
    args = call.arguments()
    function = function_of(call.operator, args, [0])
    expected = torch.func.jvp(function, (args[0],), (args[0],))[1]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(torch.func.jvp(function, (args[0],), (args[0],))[1], expected)
        leaf = args[0].requires_grad_()
        [grad] = torch.autograd.grad(call.operator(*args).square().sum(), leaf, create_graph=True)
        assert torch.autograd.grad(grad.sum(), leaf)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@every_call
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float64])
def test_autocast_names_a_wrong_dtype(call: Call, dtype: torch.dtype) -> None:
    args = call.arguments()
    for i in call.operator.tensors[1:]:
        if args[i] is not None:
            wrong = [value.to(dtype) if i == n else value for n, value in enumerate(args)]
            name = call.operator.arguments[i]
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^{name} has dtype {dtype}"):
                call.operator.overload(*wrong)


@one_each
def test_a_cotangent_on_another_device_raises(call: Call) -> None:
    grad, *args = call.backward_arguments(call.arguments())
    with pytest.raises((ValueError, RuntimeError), match="grad_output is on meta"):
        call.backward_operator.overload(grad.to("meta"), *args)


@one_each
@pytest.mark.parametrize("number", [2**62, 2**63 - 1], ids=["2^62", "2^63-1"])
def test_a_number_beyond_any_size_raises(call: Call, number: int) -> None:
    """Sums of sizes and steps could exceed the range of int64."""
    args = call.arguments()
    backward = call.backward_arguments(args)
    for i, value in enumerate(args):
        if isinstance(value, list):
            name, wrong = call.operator.arguments[i], [number, *value[1:]]
            with pytest.raises((ValueError, RuntimeError), match=name):
                call.operator.overload(*args[:i], wrong, *args[i + 1 :])
            with pytest.raises((ValueError, RuntimeError), match=name):
                call.backward_operator.overload(*backward[: i + 1], wrong, *backward[i + 2 :])


@one_each
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.complex64], ids=str)
def test_the_bare_operator_names_a_wrong_dtype(call: Call, dtype: torch.dtype) -> None:
    args = call.arguments()
    backward = call.backward_arguments(args)
    for i in call.operator.tensors:
        if args[i] is not None:
            wrong = args[i].to(dtype)
            with pytest.raises((TypeError, RuntimeError), match=call.operator.arguments[i]):
                call.operator.overload(*args[:i], wrong, *args[i + 1 :])
            with pytest.raises((TypeError, RuntimeError), match=call.operator.arguments[i]):
                call.backward_operator.overload(*backward[: i + 1], wrong, *backward[i + 2 :])


@one_each
def test_the_fallback_checks(call: Call) -> None:
    """On a device without a kernel the reference is used, also if the operator itself is called."""
    args = call.arguments()
    for i in call.operator.tensors:
        if args[i] is not None:
            with pytest.raises((TypeError, ValueError), match=f"^{call.operator.arguments[i]} "):
                call.operator.fallback(*(value.to(torch.int16) if i == n else value for n, value in enumerate(args)))
            backward = call.backward_arguments(args)
            freed = args[i].clone()
            freed.untyped_storage().resize_(0)
            message = f"^{call.operator.arguments[i]} has a storage of 0 bytes; it must have {args[i].numel() * 4}"
            with pytest.raises(ValueError, match=message):
                call.operator.fallback(*args[:i], freed, *args[i + 1 :])
            with pytest.raises(ValueError, match=message):
                call.backward_operator.fallback(*backward[: i + 1], freed, *backward[i + 2 :])
