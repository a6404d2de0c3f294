"""The strategies of DTensor for the operators, made from their rules."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from ..ops import _torch
from ..ops._operator import Operator, operators
from ._rules import RULES, Rule

Way = tuple[list[Placement | None], Rule]
"""The placements of the outputs and then of the arguments, None for what is not a tensor; and the rule behind them."""

WHOLE = Rule({}, None)
"""Every rank computes everything."""


def register() -> None:
    """Give every operator and its backward a strategy. A second call changes nothing."""
    for name in RULES:
        forward, backward = operators[name], operators[f"{name}_backward"]
        for op, ways in ((forward, _Forward(forward)), (backward, _Backward(forward))):
            first_static = next(i for i in range(len(op.arguments)) if i not in op.tensors)
            _torch.register_strategy(op.overload, first_static, ways)


class _Forward:
    """Called with the arguments of the operator, shapes in place of tensors."""

    def __init__(self, op: Operator) -> None:
        self.op = op

    def __call__(self, args: Sequence[Any]) -> list[Way]:
        named = dict(zip(self.op.arguments, args, strict=True))
        ways: list[Way] = [([Replicate(), *self.placements(WHOLE, named)], WHOLE)]
        for rule in RULES[self.op.name](named):
            output = Partial() if rule.output is None else Shard(rule.output)
            ways.append(([output, *self.placements(rule, named)], rule))
        return ways

    def placements(self, rule: Rule, named: Mapping[str, Any]) -> list[Placement | None]:
        tensors = {self.op.arguments[i] for i in self.op.tensors}
        return [
            _along(rule.places.get(name)) if name in tensors and value is not None else None
            for name, value in named.items()
        ]


class _Backward:
    """The same for the backward of an operator."""

    def __init__(self, op: Operator) -> None:
        self.op, self.forward = op, _Forward(op)

    def __call__(self, args: Sequence[Any]) -> list[Way]:
        _, *inputs, output_mask = args
        named = dict(zip(self.op.arguments, inputs, strict=True))
        whole: list[Placement | None] = [Replicate() for _ in output_mask]
        ways: list[Way] = [([*whole, Replicate(), *self.forward.placements(WHOLE, named), None], WHOLE)]
        for rule in RULES[self.op.name](named):
            gradients: list[Placement | None] = [
                _of_gradient(rule, self.op.arguments[i]) if asked else Replicate()
                for i, asked in zip(self.op.differentiable, output_mask, strict=True)
            ]
            ways.append(([*gradients, _along(rule.output), *self.forward.placements(rule, named), None], rule))
        return ways


def _along(axis: int | None) -> Placement:
    return Replicate() if axis is None else Shard(axis)


def _of_gradient(rule: Rule, name: str) -> Placement:
    return Shard(rule.places[name]) if name in rule.places else Partial()
