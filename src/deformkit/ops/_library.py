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

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch
from ._operator import Operator, function_of, library, vjp
from ._schema import argument_names, backward_schema
from ._shape import CHOICES, check_alike, name_of

_AUTOCAST = {"cpu": _torch.DispatchKey.AutocastCPU, "cuda": _torch.DispatchKey.AutocastCUDA}


def define(
    schema: str,
    *,
    gpu: str,
    reference: Callable[..., Tensor],
    check: Callable[..., list[int]],
    differentiable: Sequence[str],
    coordinates: Sequence[str],
    batched: Sequence[str],
    rows: Mapping[str, int],
) -> Operator:
    """Register ``deformkit::<name>`` and ``deformkit::<name>_backward``; return the forward operator.

    Args:
        schema: ``"name(Tensor input, ..., int boundary) -> Tensor"``, without namespace and without defaults.
        gpu: the module of the Triton launchers ``forward`` and ``backward``; imported with the first call on a GPU.
        reference: the operator in differentiable tensor operations, arguments as in the schema, but the name of a
            choice instead of its code.
        check: raises unless the arguments fit; returns the output's shape. Dtype and device are the first tensor's.
        differentiable: the tensors that have a gradient. The backward returns one tensor for each, in this order;
            one that its ``output_mask`` does not ask for comes back as an empty tensor.
        coordinates: the tensors that autocast leaves alone.
        batched: the tensors whose first axis is the batch; the output's is too.
        rows: an axis along which the output can be computed in parts, and the same axis of the tensors that have it.
    """

    def double_gradient(
        op: Operator, args: list[Any], grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        asked = [i for i, yes in zip(op.differentiable, wanted, strict=True) if yes]
        axes = [rows.get(argument) for argument in op.arguments]
        found: list[list[Tensor]] = [[] for _ in asked]
        for start, count in _parts(op, args, axes):
            part = _cut(args, axes, start, count)
            if "padding" in op.arguments:
                # The positions of the part are stride * (start + o) - padding.
                stride, padding = (op.arguments.index(step) for step in ("stride", "padding"))
                part[padding] = [args[padding][0] - args[stride][0] * start, *args[padding][1:]]
            outputs, pull_back = vjp(function_of(op.reference, part, asked), *(part[i] for i in asked))
            some = _cut(grads, [axes[i] for i in op.differentiable[1:]], start, count)
            cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, some, strict=True))
            for kept, new, i in zip(found, pull_back(cotangents), asked, strict=True):
                kept[:] = [*kept, new] if axes[i] is not None or not kept else [kept[0] + new]
        whole = iter(
            kept[0] if axis is None else torch.cat(kept, axis)
            for kept, axis in zip(found, [axes[i] for i in asked], strict=True)
        )
        return [next(whole) if yes else None for yes in wanted]

    return register(
        schema,
        gpu=gpu,
        reference=reference,
        check=check,
        differentiable=differentiable,
        coordinates=coordinates,
        batched=batched,
        double_gradient=double_gradient,
    )


class Adjoint(NamedTuple):
    """What computes an operator that has no kernels of its own: those of its partner."""

    partner: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


def register(
    schema: str,
    *,
    gpu: str | None,
    reference: Callable[..., Tensor],
    check: Callable[..., list[int]],
    differentiable: Sequence[str],
    coordinates: Sequence[str],
    batched: Sequence[str],
    double_gradient: Callable[..., Sequence[Tensor | None]],
    adjoint: Adjoint | None = None,
) -> Operator:
    """Register an operator and its backward; :func:`define` and ``define_adjoint`` document the arguments.

    ``double_gradient(op, args, grads, wanted)`` is the gradient of the backward, ``op``.
    """
    name, names = schema[: schema.index("(")], argument_names(schema)
    reference = _of_codes(reference, names)

    def fake(*args: Any) -> Tensor:
        return args[0].new_empty(check(*args))

    def check_backward(grad_output: Tensor, *args: Any) -> None:
        *inputs, output_mask = args
        shape = check(*inputs)
        check_alike("grad_output", grad_output, names[0], inputs[0])
        if list(grad_output.shape) != shape:
            raise ValueError(f"grad_output has shape {list(grad_output.shape)}; it must be {shape}")
        if len(output_mask) != len(differentiable):
            raise ValueError(f"output_mask is {output_mask}; it needs {len(differentiable)} values")

    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        check_backward(grad_output, *args)
        *inputs, output_mask = args
        return tuple(
            torch.empty_like(inputs[i], memory_format=torch.contiguous_format) if asked else grad_output.new_empty(0)
            for i, asked in zip(forward.differentiable, output_mask, strict=True)
        )

    def reference_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *inputs, output_mask = args
        asked = [i for i, yes in zip(forward.differentiable, output_mask, strict=True) if yes]
        values = [inputs[i] for i in asked]
        grads = iter(_pull_back(function_of(reference, inputs, asked), values, grad_output) if asked else ())
        return tuple(next(grads) if yes else grad_output.new_empty(0) for yes in output_mask)

    def gradient(
        op: Operator, args: list[Any], grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        results = backward(grads[0], *args, wanted)
        return [grad if yes else None for grad, yes in zip(results, wanted, strict=True)]

    forward = Operator(
        schema,
        gpu=gpu,
        partner=adjoint.partner if adjoint else None,
        reference=reference,
        implementation=adjoint.forward if adjoint else reference,
        check=check,
        fake=fake,
        differentiable=differentiable,
        coordinates=coordinates,
        batched=batched,
        batched_result=lambda *args: True,
        gradient=gradient,
    )
    without_batch = [i for i, name in enumerate(differentiable) if name not in batched]
    backward = Operator(
        backward_schema(schema, len(differentiable)),
        gpu=gpu,
        partner=forward.partner,
        reference=reference_backward,
        implementation=adjoint.backward if adjoint else reference_backward,
        check=check_backward,
        fake=fake_backward,
        differentiable=["grad_output", *differentiable],
        coordinates=coordinates,
        batched=["grad_output", *batched],
        batched_result=lambda *args: not any(args[-1][i] for i in without_batch),
        gradient=double_gradient,
    )
    for device_type, key in _AUTOCAST.items():
        library.impl(name, partial(_autocast, forward, device_type, _torch.DispatchKeySet(key)), key.name)
    return forward


# The number of input elements of a part of a double backward; the reference keeps several dozen times as many.
_PART, _MOST_PARTS = 2**17, 64


def _parts(op: Operator, args: Sequence[Any], axes: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each part of a double backward, which bound its memory."""
    rows = args[0].shape[axes[0]]
    numbers = sum(args[i].numel() for i in op.tensors if args[i] is not None)
    step = -(-rows // min(numbers // _PART + 1, _MOST_PARTS))
    for start in range(0, max(rows, 1), max(step, 1)):
        yield start, min(step, rows - start)


def _cut(values: Sequence[Any], axes: Sequence[int | None], start: int, count: int) -> list[Any]:
    return [
        value if value is None or axis is None else value.narrow(axis, start, count)
        for value, axis in zip(values, axes, strict=True)
    ]


def _autocast(op: Operator, device_type: str, key: Any, *args: Any) -> Tensor:
    op.check(*args)
    cast = [i for i in op.tensors if i not in op.coordinates and args[i] is not None]
    values = list(args)
    if args[cast[0]].dtype != torch.float64:
        for i in cast:
            values[i] = args[i].to(torch.get_autocast_dtype(device_type))
    with _torch.without_keys(key):
        return op.overload(*values)


def _of_codes(function: Callable[..., Tensor], arguments: Sequence[str]) -> Callable[..., Tensor]:
    """``function``, which takes the names of choices, as a function of their codes."""
    choices = [(i, argument) for i, argument in enumerate(arguments) if argument in CHOICES]

    def of_codes(*args: Any) -> Tensor:
        values = list(args)
        for i, argument in choices:
            values[i] = name_of(argument, values[i])
        return function(*values)

    return of_codes


def _pull_back(function: Callable[..., Tensor], values: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor]:
    """The gradients of ``function`` at ``values``, which are differentiable inside a transform of torch.func."""
    if _torch.transforms_active():
        return vjp(function, *values)[1](cotangent)
    with _torch.with_autograd():
        leaves = [value.detach().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)
