"""The adjoint of an operator as an operator of its own: one call of :func:`define_adjoint` for each.

An operator F is linear in some of its tensors. Let x be one of these, and ``rest`` the other arguments. The adjoint A
maps u, which has the shape of F's output, to a tensor of the shape of x, such that for every x

    ``<u, F(x, rest)> = <A(u, rest), x>``

Hence A(u, rest) is the gradient of ``<u, F(x, rest)>`` by x, which does not depend on x: the backward kernel of F
computes it. The gradients of ``<g, A(u, rest)> = <u, F(g, rest)>`` are also F's: ``F(g, rest)`` by u, and those of F at
``x = g`` by the rest. An adjoint needs no kernels, and its gradients take the time of its partner's. In C++ the same
calls are in ``cpu/adjoints.cpp``, for programs without Python.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import _torch
from ._library import Adjoint, register
from ._operator import Operator, operators
from ._schema import argument_names

RESULT = "the result"
"""The place of x among the arguments of F."""

_AUTOCAST = _torch.DispatchKeySet(_torch.DispatchKey.AutocastCPU) | _torch.DispatchKeySet(
    _torch.DispatchKey.AutocastCUDA
)


def define_adjoint(
    schema: str,
    *,
    of: str,
    arguments: Sequence[str | int | None],
    reference: Callable[..., Tensor],
    check: Callable[..., list[int]],
    differentiable: Sequence[str],
    coordinates: Sequence[str],
    batched: Sequence[str],
) -> Operator:
    """Register ``deformkit::<name>``, an adjoint of the operator ``of``, and its backward; return the former.

    Args:
        schema: as for :func:`~deformkit.ops._library.define`. The first argument is u. The others give the shape of x.
        of: the name of F. It is looked up when the adjoint is called, so it may be registered later.
        arguments: for each of F's arguments in order, the name of the adjoint's argument that it is, or a constant;
            and :data:`RESULT` in the place of x.
        reference: the adjoint in differentiable tensor operations, arguments as in the schema, but the name of a choice
            instead of its code. It defines the result; kernels are compared with it.
        check: raises unless the arguments fit; returns the shape of x.
        differentiable: the tensors that have a gradient, u first.
        coordinates: the tensors that autocast leaves alone.
        batched: the tensors whose first axis is the batch; the result's is too.
    """
    names = argument_names(schema)

    def original(args: Sequence[Any], x: Tensor) -> list[Any]:
        """The arguments of F, from those of the adjoint."""
        own = {**dict(zip(names, args, strict=True)), RESULT: x}
        return [own[name] if isinstance(name, str) else name for name in arguments]

    def inputs_of(partner: Operator) -> list[str]:
        """For each tensor of F that has a gradient, the adjoint's name for it; that of x is ``grad_output``."""
        return ["grad_output" if arguments[i] == RESULT else str(arguments[i]) for i in partner.differentiable]

    def forward(*args: Any) -> Tensor:
        partner, backward = operators[of], operators[f"{of}_backward"]
        # F is linear in x: nothing reads it where only its gradient is asked for.
        x = args[0].new_empty(()).expand(check(*args))
        asked = [name == "grad_output" for name in inputs_of(partner)]
        with _torch.without_keys(_AUTOCAST):
            return backward.overload(args[0], *original(args, x), asked)[asked.index(True)]

    def backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        partner, partner_backward = operators[of], operators[f"{of}_backward"]
        *inputs, output_mask = args
        wanted = dict(zip(differentiable, output_mask, strict=True))
        values, order = original(inputs, grad_output), inputs_of(partner)
        asked = [wanted.get(name, False) for name in order]
        found: dict[str, Tensor] = {}
        with _torch.without_keys(_AUTOCAST):
            if any(asked):
                found.update(zip(order, partner_backward.overload(inputs[0], *values, asked), strict=True))
            if output_mask[0]:
                found[differentiable[0]] = partner.overload(*values)
        return tuple(found[name] if yes else grad_output.new_empty(0) for name, yes in wanted.items())

    def double_gradient(
        op: Operator, args: list[Any], grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        partner, partner_backward = operators[of], operators[f"{of}_backward"]
        grad_output, *inputs, _ = args
        wanted_by_name = dict(zip(["grad_output", *differentiable], wanted, strict=True))
        given = dict(zip(differentiable, grads, strict=True))
        values, order = original(inputs, grad_output), inputs_of(partner)
        asked = [wanted_by_name.get(name, False) for name in order]
        u = differentiable[0]
        parts: list[dict[str, Tensor | None]] = []
        if given[u] is not None and any(asked):
            # Of <v, F(g, rest)>, where v is what came back for the gradient by u.
            parts.append(dict(zip(order, partner_backward(given[u], *values, asked), strict=True)))
        cotangents = [given.get(name) for name in order]
        if any(cotangent is not None for cotangent in cotangents):
            # Of what came back for the gradients of F at x = g.
            mask = [cotangent is not None for cotangent in cotangents]
            backward_args = [inputs[0], *values, mask]
            found = partner_backward.gradient(backward_args, cotangents, [wanted_by_name[u], *asked])
            parts.append(dict(zip([u, *order], found, strict=True)))
        totals: list[Tensor | None] = []
        for name, yes in wanted_by_name.items():
            terms = [term for part in parts if yes and (term := part.get(name)) is not None]
            totals.append(sum(terms[1:], terms[0]) if terms else None)
        return totals

    return register(
        schema,
        gpu=None,
        reference=reference,
        check=check,
        differentiable=differentiable,
        coordinates=coordinates,
        batched=batched,
        double_gradient=double_gradient,
        adjoint=Adjoint(of, forward, backward),
    )
