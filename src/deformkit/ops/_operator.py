"""An operator, and every way in which a call of it may run: through the kernel, the compiler, an exporter, a transform.

:mod:`._library` makes operators from a schema and a reference.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from types import new_class
from typing import Any

import torch
from torch import Tensor

from . import _form, _torch
from ._shape import CHOICES, check_stored, code_of

NAMESPACE = "deformkit"
# Not "DEF", which excludes definitions by others: those of libdeformkit.so.
library = torch.library.Library(NAMESPACE, "FRAGMENT")
operators: dict[str, "Operator"] = {}

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class Operator:
    """A registered operator; call it like a function with all arguments in the order of the schema."""

    def __init__(
        self,
        schema: str,
        *,
        gpu: str | None,
        partner: str | None,
        reference: Callable[..., Any],
        implementation: Callable[..., Any],
        check: Callable[..., Any],
        fake: Callable[..., Any],
        differentiable: Sequence[str],
        coordinates: Sequence[str],
        batched: Sequence[str],
        batched_result: Callable[..., bool],
        gradient: Callable[..., Sequence[Tensor | None]],
    ) -> None:
        self.schema = schema
        self.name = schema[: schema.index("(")]
        self.overload = _defined(schema)
        arguments = _torch.arguments(self.overload)
        self.arguments = [name for name, _ in arguments]
        self.tensors = [i for i, (_, kind) in enumerate(arguments) if "Tensor" in kind]
        self._tensors_of = itemgetter(*self.tensors)
        self.differentiable = [self.arguments.index(name) for name in differentiable]
        self.coordinates = [self.arguments.index(name) for name in coordinates]
        self.batched = {self.arguments.index(name) for name in batched}
        self.gpu = gpu
        self.partner = partner
        self.reference = reference
        self.check = check
        self._implementation = implementation
        self._batched_result = batched_result
        self._gradient = gradient
        self._recorded = _recorded(self)
        self._transformed = _transformed(self)

        qualified = f"{NAMESPACE}::{self.name}"
        library.impl(self.name, self.fallback, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=library)
        torch.library.register_autograd(qualified, self._backward, setup_context=self._save, lib=library)
        torch.library.register_vmap(qualified, partial(self._vmap, self.overload), lib=library)
        operators[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run the operator through the dispatcher, or in another way if a transform or an exporter needs it."""
        if self._may_go_short(args):
            return self._short_way(args)
        if (form := _form.current()) and not self._stays(form, args):
            return self.reference(*args)
        if torch.compiler.is_compiling() or _torch.tracing():
            # The compiler rejects a Function with a forward-mode rule.
            return (self.reference if _torch.differentiating() else self.overload)(*args)
        if _torch.transforming():
            levels = _torch.levels()
            if levels["Jvp"] > 1 or levels["Functionalize"]:
                # A Function loses the tangent of an outer level, and cannot be functionalized.
                return (self.reference if levels["Jvp"] or levels["Grad"] else self.overload)(*args)
            # A custom operator raises under torch.func.grad and returns zeros under torch.func.jvp.
            return self._transformed.apply(*args)
        return self.overload(*args)

    def checked_call(self, *args: Any, **known: Any) -> Any:
        """Run the operator for a public function: arguments that do not fit raise what ``check(*args, **known)`` says.

        ``known`` is what only the public function knows, such as the number of axes. A kernel refuses such arguments
        too, in a fraction of the time of the check, which then says what exactly is wrong; `benchmarks/run.py overhead`
        measures how much of a small call a check before each kernel would be.
        """
        if not self._may_go_short(args):
            self.check(*args, **known)
            return self(*args)
        try:
            return self._short_way(args)
        except Exception:
            try:
                self.check(*args, **known)
            except Exception as reason:
                raise reason from None
            raise

    def _may_go_short(self, args: Sequence[Any]) -> bool:
        """Whether nothing may change this call but autograd."""
        return not (
            _form.current()
            or torch.compiler.is_compiling()
            or _torch.tracing()
            or _torch.transforming()
            or _torch.intercepted(self._tensors_of(args))
        )

    def _short_way(self, args: Sequence[Any]) -> Any:
        # The overload would do the same through what torch.library registers: 5 us more without a graph, 30 us more
        # with one and 60 us more with a backward pass, where a small call takes 100; see `benchmarks/run.py overhead`.
        if torch.is_grad_enabled() and _torch.any_requires_grad(*args):
            return self._recorded.apply(*args)
        with _torch.below_autograd():
            return self.overload(*args)

    def _stays(self, form: str, args: Sequence[Any]) -> bool:
        """Whether this call stays an operator in an exported model of this form."""
        if form == "plain" or "boundary" not in self.arguments:
            return False
        return _form.is_standard(self.name, args[0].dim() - 2, args[self.arguments.index("boundary")])

    def ordered(self, named: Mapping[str, Any]) -> list[Any]:
        """The arguments of the public function in the order of the operator, with codes in place of names."""
        return [code_of(name, named[name]) if name in CHOICES else named[name] for name in self.arguments]

    def checked(self, *args: Any) -> None:
        """Raise unless the arguments are valid for a kernel."""
        self.check(*args)
        for i in self.tensors:
            check_stored(self.arguments[i], args[i])

    def fallback(self, *args: Any) -> Any:
        """The kernel on every device that has no other: the reference, or for an adjoint the kernels of its partner."""
        self.checked(*args)
        return _over_outputs(self._implementation(*args), Tensor.contiguous)

    def gradient(
        self, args: list[Any], grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients by the differentiable arguments, for those of the outputs; None where it is not wanted."""
        return self._gradient(self, args, grads, wanted)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in self.tensors))
        ctx.plain = [None if i in self.tensors else value for i, value in enumerate(inputs)]
        ctx.set_materialize_grads(False)

    def _restore(self, ctx: Any) -> list[Any]:
        args = list(ctx.plain)
        for i, value in zip(self.tensors, ctx.saved_tensors, strict=True):
            args[i] = value
        return args

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[i] for i in self.differentiable]
        result: list[Tensor | None] = [None] * len(self.arguments)
        if any(grad is not None for grad in grads) and any(wanted):
            for i, grad in zip(self.differentiable, self.gradient(self._restore(ctx), grads, wanted), strict=True):
                result[i] = grad
        return tuple(result)

    def _vmap(self, call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        mapped, count = {i for i in self.tensors if in_dims[i] is not None}, info.batch_size
        moved = [args[i].movedim(in_dims[i], 0) if i in mapped else value for i, value in enumerate(args)]
        if count and mapped <= self.batched and self._batched_result(*args):
            for i in self.batched:
                if moved[i] is not None:
                    whole = moved[i] if i in mapped else moved[i].unsqueeze(0).expand(count, *moved[i].shape)
                    moved[i] = whole.flatten(0, 1)

            def unfold(result: Tensor) -> Tensor:
                # A gradient that is not asked for has one axis, of no elements.
                return result.unflatten(0, (count, -1)) if result.dim() > 1 else result.expand(count, 0)

            return _over_outputs(call(*moved), unfold), 0
        # The shape of an empty stack is found from one call with zeros, through which gradients still flow.
        calls = [[v.sum(0) if i in mapped else v for i, v in enumerate(moved)]] if not count else []
        calls += [[v[n] if i in mapped else v for i, v in enumerate(moved)] for n in range(count)]
        results = [call(*one) for one in calls]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:count], 0
        return tuple(torch.stack(parts)[:count] for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _defined(schema: str) -> Any:
    """The overload of the operator ``schema``, which is defined here unless libdeformkit.so has done it."""
    namespace, name = getattr(torch.ops, NAMESPACE), schema[: schema.index("(")]
    if not hasattr(namespace, name):
        library.define(schema, tags=_TAGS)
    overload = getattr(namespace, name).default
    if not _torch.has_schema(overload, f"{NAMESPACE}::{schema}"):
        raise ImportError(
            f"{NAMESPACE}::{name} exists already, from another version of deformkit: {_torch.schema(overload)}; this "
            f"one needs {schema}. Load the library at deformkit.library_path()"
        )
    return overload


def _recorded(op: Operator) -> type[torch.autograd.Function]:
    """The operator as an autograd.Function whose forward runs below autograd."""

    def forward(ctx: Any, *args: Any) -> Any:
        with _torch.below_autograd():
            output = op.overload(*args)
        op._save(ctx, args, output)
        return output

    return _function(op.name, forward=forward, backward=op._backward)


def _transformed(op: Operator) -> type[torch.autograd.Function]:
    """The operator as an autograd.Function for torch.func and for forward-mode differentiation.

    Only these need ``setup_context``, for which torch inspects the signature of ``forward`` in every call.
    """

    def forward(*args: Any) -> Any:
        return op.overload(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        op._save(ctx, inputs, output)
        ctx.save_for_forward(*(inputs[i] for i in op.tensors))

    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        return op._vmap(op, info, in_dims, *args)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # The derivative along a direction is the gradient of the (linear) pull-back with respect to its cotangent.
        args = op._restore(ctx)
        moved = [i for i in op.differentiable if tangents[i] is not None]
        outputs, pull_back = vjp(function_of(op.reference, args, moved), *(args[i] for i in moved))
        _, push_forward = vjp(pull_back, _over_outputs(outputs, torch.zeros_like))
        return push_forward(tuple(tangents[i] for i in moved))[0]

    return _function(op.name, forward=forward, setup_context=setup_context, backward=op._backward, vmap=vmap, jvp=jvp)


def _function(name: str, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
    """An autograd.Function whose node in a graph is called ``<name>Backward``, as anomaly detection prints it."""
    body = {method: staticmethod(function) for method, function in methods.items()}
    return new_class(name, (torch.autograd.Function,), exec_body=lambda namespace: namespace.update(body))


def function_of(function: Callable[..., Any], args: Sequence[Any], positions: Sequence[int]) -> Callable[..., Any]:
    """``function`` as a function of its arguments at ``positions``; the others are those of ``args``."""

    def of_some(*values: Any) -> Any:
        full = list(args)
        for i, value in zip(positions, values, strict=True):
            full[i] = value
        return function(*full)

    return of_some


def _over_outputs(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of the one output, or of each of several."""
    return function(value) if isinstance(value, Tensor) else tuple(function(part) for part in value)


def vjp(function: Callable[..., Any], *values: Any) -> tuple[Any, Callable[..., Any]]:
    """The value of ``function``, and what maps a cotangent to the gradients."""
    return torch.func.vjp(function, *values)[:2]
