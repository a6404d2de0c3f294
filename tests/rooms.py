"""Finds every operator and its cases: a room is a package of deformkit.ops with a module ``cases``."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit
import deformkit.ops
from deformkit._kernels import selection
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops._operator import Operator, operators
from deformkit.ops._shape import CHOICES, name_of

WILD = ["nan", "inf", "-inf", 1e38, -1e38, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), -1.0, 1e5, -1e5]


@dataclass(frozen=True)
class Call:
    """One operator with one of its cases."""

    operator: Operator
    case: Any

    def __str__(self) -> str:
        return f"{self.operator.name}-{self.case.name}"

    @property
    def backward_operator(self) -> Operator:
        return operators[self.operator.name + "_backward"]

    def arguments(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
        """The arguments in the order of the schema."""
        return self.operator.ordered(self.case.arguments(dtype=dtype, seed=seed))

    def backward_arguments(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of the backward operator, with all gradients requested."""
        output = self.operator(*args)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [grad.to(output.dtype), *args, [args[i] is not None for i in self.operator.differentiable]]

    def positions(self, args: Sequence[Any]) -> list[int]:
        """The arguments that are given and have a gradient."""
        return [i for i in self.operator.differentiable if args[i] is not None]


def check(call: Call, args: Sequence[Any]) -> None:
    """Compare the value and every gradient of the operator at ``args`` with the reference, by the tolerance rule."""
    operator, positions, dtype = call.operator, call.positions(args), args[0].dtype
    actual, reference = (evaluate(function, args, positions, dtype) for function in (operator, operator.reference))
    truth = evaluate(operator.reference, double(args), positions, dtype)
    names = ["output", *(f"gradient of {operator.arguments[i]}" for i in positions)]
    for name, *results in zip(names, actual, truth, reference, strict=True):
        assert_close(*results, name=name)


def check_bits(call: Call, args: Sequence[Any]) -> Tensor:
    """The value at ``args``. Fails unless it and every gradient are bit-identical for any number of threads."""
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(evaluate(call.operator, args, call.positions(args), args[0].dtype))
    names = ["output", *(f"gradient of {call.operator.arguments[i]}" for i in call.positions(args))]
    for name, one, *others in zip(names, *found, strict=True):
        for other in others:
            assert_equal(one, other, name)
    return found[0][0]


def check_survives(code: str) -> None:
    """Run ``code``, which may use the coordinates ``wild``, in a separate process: it may raise, but not crash."""
    head = f"import torch, deformkit as dk\ntorch.manual_seed(0)\nwild = [float(value) for value in {WILD}]\n"
    run = subprocess.run([sys.executable, "-c", f"{head}{code}\nprint('survived')"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "survived\n"), run.stderr


def double(args: Sequence[Any]) -> list[Any]:
    """The same arguments in float64."""
    return [v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]


def _discover() -> list[Call]:
    calls = []
    for room in pkgutil.iter_modules(deformkit.ops.__path__, "deformkit.ops."):
        if room.ispkg:
            package = importlib.import_module(room.name)
            if any(module.name == "cases" for module in pkgutil.iter_modules(package.__path__)):
                cases = importlib.import_module(f"{room.name}.cases")
                calls += [Call(operators[cases.OPERATOR], case) for case in cases.CASES]
    return calls


CALLS = _discover()


def representatives(each_axes: bool = True) -> list[Call]:
    """The first case of each operator, for each number of axes or only for the first, for tests with slow calls."""
    first: dict[tuple[str, int], Call] = {}
    for call in CALLS:
        first.setdefault((call.operator.name, call.case.axes if each_axes else 0), call)
    return list(first.values())


def also(name: str, without: str, with_it: str) -> pytest.MarkDecorator:
    """The arguments ``call`` and ``name`` of a test: every representative without it, planes also with it."""
    return pytest.mark.parametrize(
        ("call", name),
        [
            pytest.param(call, slow, id=f"{call}-{with_it if slow else without}")
            for call in representatives()
            for slow in (False, True)
            if not slow or call.case.axes == 2
        ],
    )


def public(call: Call, args: Sequence[Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """The public function of a case, and the arguments ``args`` or its own, in the types that TorchScript takes."""
    name, axes, case = call.operator.name, call.case.axes, call.case
    named = dict(zip(call.operator.arguments, call.arguments() if args is None else args, strict=True))
    for choice in CHOICES.keys() & named.keys():
        named[choice] = name_of(choice, named[choice])
    if "spatial_shapes" in named:
        flat = named["spatial_shapes"]
        named["spatial_shapes"] = [flat[i : i + axes] for i in range(0, len(flat), axes)]
    if "query" in named:
        named["query"] = named["query"].unflatten(2, (case.heads, -1))
    return getattr(deformkit, f"{name}{axes}d" if "conv" in name else name), named


class Of(nn.Module):
    """The public function of a call, as a module whose arguments are its tensors, ``values``."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.function, named = public(call)
        self.names = [name for name, value in named.items() if isinstance(value, Tensor)]
        self.rest = {name: value for name, value in named.items() if name not in self.names}
        self.values = tuple(named[name] for name in self.names)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(**dict(zip(self.names, values, strict=True)), **self.rest)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def _reversed_order(t: Tensor) -> Tensor:
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def _offset_storage(t: Tensor) -> Tensor:
    return torch.cat([torch.full((3,), torch.nan, dtype=t.dtype), t.flatten()])[3:].view(t.shape)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


LAYOUTS = [_transposed, _channels_last, _strided, _reversed_order, _offset_storage, _expanded]


def has_kernel(name: str) -> bool:
    """Whether there is a CPU kernel of an operator, or of the partner of an adjoint."""
    name = operators[name].partner or name
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"deformkit::{name}", "CPU")


needs_kernels = pytest.mark.skipif(selection.path is None, reason="no library of kernels is built")


def needs_kernel(name: str) -> pytest.MarkDecorator:
    """For properties of CPU kernels that the reference lacks. The contract tests verify that there is a kernel."""
    return pytest.mark.skipif(not has_kernel(name), reason=f"{name} has no CPU kernel")
