"""How an operator becomes part of PyTorch: one call of :func:`define` for each.

From a forward reference written in tensor operations and a function for the output's shape, ``define`` derives

* the schemas of ``deformkit::<name>`` and ``deformkit::<name>_backward`` and their fake implementations,
* autograd, and autograd of the backward (double backward, through the reference),
* vmap: folded into the batch where every mapped argument has one, else a loop,
* the transforms of ``torch.func`` and forward-mode differentiation,
* autocast, which never touches coordinates,
* the reference itself on every device that has no kernel.

A kernel is then only ``STABLE_TORCH_LIBRARY_IMPL(deformkit, CPU, m)`` in C++ or ``torch.library.register_kernel``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from ._shape import CHOICES, code_of, name_of

NAMESPACE = "deformkit"
library = torch.library.Library(NAMESPACE, "DEF")
operators: dict[str, "Operator"] = {}

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_AUTOCAST = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}
_AUTOGRAD_KEYS = (
    DispatchKeySet(DispatchKey.AutogradCPU)
    | DispatchKeySet(DispatchKey.AutogradCUDA)
    | DispatchKeySet(DispatchKey.AutogradOther)
    | DispatchKeySet(DispatchKey.AutogradMPS)
    | DispatchKeySet(DispatchKey.AutogradXPU)
    | DispatchKeySet(DispatchKey.AutogradFunctionality)
    | DispatchKeySet(DispatchKey.ADInplaceOrView)
)


class Operator:
    """A registered operator: call it like a function, with every argument in the schema's order."""

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        differentiable: Sequence[str],
        batched: Sequence[str],
        batched_result: Callable[..., bool],
        gradient: Callable[..., Sequence[Tensor | None]],
    ) -> None:
        library.define(schema, tags=_TAGS)
        self.name = schema[: schema.index("(")]
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.arguments = [argument.name for argument in self.overload._schema.arguments]
        self.reference = reference
        self.fake = fake
        self.tensors = [
            i for i, argument in enumerate(self.overload._schema.arguments) if "Tensor" in str(argument.type)
        ]
        self.differentiable = [self.arguments.index(name) for name in differentiable]
        self.coordinates: list[int] = []
        self.batched = {self.arguments.index(name) for name in batched}
        self._batched_result = batched_result
        self._gradient = gradient
        self._function = _function(self)

        qualified = f"{NAMESPACE}::{self.name}"
        library.impl(self.name, self._contiguous_reference, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=library)
        torch.library.register_autograd(qualified, self._backward, setup_context=self._save, lib=library)
        torch.library.register_vmap(qualified, partial(self._vmap, self.overload), lib=library)
        operators[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run the operator: through the dispatcher, or through an autograd.Function where a transform needs one."""
        # A custom operator raises under torch.func.grad and returns zeros under torch.func.jvp; a Function does
        # neither. But the compiler rejects a Function with a forward-mode rule: there a transform takes the reference.
        if torch.compiler.is_compiling():
            return self.reference(*args) if _differentiating() else self.overload(*args)
        if _transforming():
            return self._function.apply(*args)
        return self.overload(*args)

    def ordered(self, named: Mapping[str, Any]) -> list[Any]:
        """The operator's arguments from those of the public function: in order, and codes instead of names."""
        return [code_of(name, named[name]) if name in CHOICES else named[name] for name in self.arguments]

    def _contiguous_reference(self, *args: Any) -> Any:
        return _each(self.reference(*args), Tensor.contiguous)

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
            for i, grad in zip(
                self.differentiable, self._gradient(self, self._restore(ctx), grads, wanted), strict=True
            ):
                result[i] = grad
        return tuple(result)

    def _vmap(self, call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        mapped = {i for i in self.tensors if in_dims[i] is not None}
        moved = [args[i].movedim(in_dims[i], 0) if i in mapped else value for i, value in enumerate(args)]
        if mapped <= self.batched and self._batched_result(*args):
            count = info.batch_size
            for i in self.batched:
                if moved[i] is not None:
                    whole = moved[i] if i in mapped else moved[i].unsqueeze(0).expand(count, *moved[i].shape)
                    moved[i] = whole.flatten(0, 1)
            return _each(call(*moved), lambda t: t.unflatten(0, (count, -1)) if t.dim() > 1 else t.expand(count, 0)), 0
        slices = [call(*(v[n] if i in mapped else v for i, v in enumerate(moved))) for n in range(info.batch_size)]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])


def define(
    schema: str,
    *,
    reference: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    differentiable: Sequence[str],
    coordinates: Sequence[str] = (),
    batched: Sequence[str] = (),
) -> Operator:
    """Register ``deformkit::<name>`` and ``deformkit::<name>_backward``; return the forward operator.

    Args:
        schema: ``"name(Tensor input, ..., int boundary) -> Tensor"``, without namespace and without defaults.
        reference: the operator in differentiable tensor operations, arguments as in the schema, but the name of a
            choice instead of its code.
        fake: an empty output of the right shape, from the same arguments.
        differentiable: the tensors that have a gradient. The backward returns one tensor for each, in this order;
            one that its ``output_mask`` does not ask for comes back as an empty tensor.
        coordinates: the tensors that autocast leaves alone.
        batched: the tensors whose first axis is the batch; the output's is too.
    """
    name, rest = schema.split("(", 1)
    arguments, _ = rest.rsplit(") ->", 1)
    choices = [(i, key) for i, key in enumerate(a.split()[-1] for a in arguments.split(", ")) if key in CHOICES]
    reference = _of_codes(reference, choices)

    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *inputs, output_mask = args
        return tuple(
            torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
            if asked
            else inputs[i].new_empty(0)
            if inputs[i] is not None
            else grad_output.new_empty(0)
            for i, asked in zip(forward.differentiable, output_mask, strict=True)
        )

    def reference_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *inputs, output_mask = args
        asked = [i for i, yes in zip(forward.differentiable, output_mask, strict=True) if yes]
        values = [inputs[i] for i in asked]
        grads = iter(_pull_back(_at(reference, inputs, asked), values, grad_output) if asked else ())
        return tuple(next(grads) if yes else grad_output.new_empty(0) for yes in output_mask)

    def gradient(op: Operator, args: list[Any], grads: Sequence[Tensor | None], wanted: list[bool]) -> Sequence[Any]:
        results = backward(grads[0], *args, wanted)
        return [grad if yes else None for grad, yes in zip(results, wanted, strict=True)]

    def double_gradient(
        op: Operator, args: list[Any], grads: Sequence[Tensor | None], wanted: list[bool]
    ) -> Sequence[Any]:
        asked = [i for i, yes in zip(op.differentiable, wanted, strict=True) if yes]
        outputs, pull_back = _vjp(_at(reference_backward, args, asked), *(args[i] for i in asked))
        cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
        results = iter(pull_back(cotangents))
        return [next(results) if yes else None for yes in wanted]

    forward = Operator(
        schema,
        reference=reference,
        fake=fake,
        differentiable=differentiable,
        batched=batched,
        batched_result=lambda *args: True,
        gradient=gradient,
    )
    without_batch = [i for i, name in enumerate(differentiable) if name not in batched]
    results = ", ".join(["Tensor"] * len(differentiable))
    backward = Operator(
        f"{name}_backward(Tensor grad_output, {arguments}, bool[] output_mask) -> ({results})",
        reference=reference_backward,
        fake=fake_backward,
        differentiable=["grad_output", *differentiable],
        batched=["grad_output", *batched],
        batched_result=lambda *args: not any(args[-1][i] for i in without_batch),
        gradient=double_gradient,
    )
    forward.coordinates = [forward.arguments.index(name) for name in coordinates]
    _register_autocast(forward)
    return forward


def _register_autocast(op: Operator) -> None:
    for device_type, key in _AUTOCAST.items():
        library.impl(op.name, partial(_autocast, op, device_type, DispatchKeySet(key)), key.name)


def _autocast(op: Operator, device_type: str, keys: DispatchKeySet, *args: Any) -> Tensor:
    cast = [i for i in op.tensors if i not in op.coordinates and args[i] is not None]
    values = list(args)
    if all(args[i].dtype != torch.float64 for i in cast):
        for i in cast:
            if args[i].is_floating_point():
                values[i] = args[i].to(torch.get_autocast_dtype(device_type))
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op.overload(*values)


def _function(op: Operator) -> type[torch.autograd.Function]:
    """The operator as an autograd.Function, for torch.func and for forward-mode differentiation."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op.overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            op._save(ctx, inputs, output)
            ctx.save_for_forward(*(inputs[i] for i in op.tensors))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return op._backward(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
            return op._vmap(op, info, in_dims, *args)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            # The derivative along a direction is the gradient of the (linear) pull-back with respect to its cotangent.
            args = op._restore(ctx)
            moved = [i for i in op.differentiable if tangents[i] is not None]
            outputs, pull_back = _vjp(_at(op.reference, args, moved), *(args[i] for i in moved))
            _, push_forward = _vjp(pull_back, _each(outputs, torch.zeros_like))
            return push_forward(tuple(tangents[i] for i in moved))[0]

    Function.__name__ = op.name
    return Function


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _differentiating() -> bool:
    """Whether a transform other than vmap is active; asked while the compiler traces, which enters them as it goes."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return forward_ad._current_level >= 0 or any(
        level.key() != torch._C._functorch.TransformType.Vmap for level in levels
    )


# What torch.compiler.assume_constant_result does, which would import the whole compiler for it, a second and more.
_differentiating._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_codes(function: Callable[..., Tensor], choices: Sequence[tuple[int, str]]) -> Callable[..., Tensor]:
    """``function``, which takes the names of ``choices``, of their codes."""

    def of_codes(*args: Any) -> Tensor:
        values = list(args)
        for i, argument in choices:
            values[i] = name_of(argument, values[i])
        return function(*values)

    return of_codes


def _at(function: Callable[..., Any], args: Sequence[Any], positions: Sequence[int]) -> Callable[..., Any]:
    """``function`` of the arguments at ``positions`` alone."""

    def of_some(*values: Any) -> Any:
        full = list(args)
        for i, value in zip(positions, values, strict=True):
            full[i] = value
        return function(*full)

    return of_some


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return function(value) if isinstance(value, Tensor) else tuple(function(part) for part in value)


def _vjp(function: Callable[..., Any], *values: Any) -> tuple[Any, Callable[..., Any]]:
    return torch.func.vjp(function, *values)  # type: ignore[return-value]  # with has_aux there would be a third


def _pull_back(function: Callable[..., Tensor], values: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor]:
    """The gradients of ``function`` at ``values``; differentiable again inside a transform of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return _vjp(function, *values)[1](cotangent)
    # As a kernel: the dispatcher has switched autograd off on the way here.
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS), torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)
