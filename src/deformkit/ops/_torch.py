"""All private symbols of torch that the operators use.

Each was tested on torch 2.10.0, 2.12.0, 2.13.0 and 2.14.1, in the tests of the operators, of TorchScript, of the
compiler and of sharding. One that is added names the releases on which it was tested, until it was on all of these.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.autograd import forward_ad

# TorchScript's type of a list that may be given as one number.
BroadcastingList1, BroadcastingList2, BroadcastingList3 = (
    getattr(torch._jit_internal, f"BroadcastingList{axes}") for axes in (1, 2, 3)
)
any_requires_grad = torch._C._any_requires_grad
below_autograd = torch._C._AutoDispatchBelowAutograd
DispatchKey = torch._C.DispatchKey
DispatchKeySet = torch._C.DispatchKeySet
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
has_storage = torch._C._has_storage  # whether a tensor lies in memory that torch manages
tracing = torch._C._is_tracing
transforms_active = torch._C._are_functorch_transforms_active
without_keys = torch._C._ExcludeDispatchKeyGuard
wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # whether torch.func hides a tensor's values

_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
_AUTOGRAD_KEYS = (
    DispatchKeySet(DispatchKey.AutogradCPU)
    | DispatchKeySet(DispatchKey.AutogradCUDA)
    | DispatchKeySet(DispatchKey.AutogradOther)
    | DispatchKeySet(DispatchKey.AutogradMPS)
    | DispatchKeySet(DispatchKey.AutogradXPU)
    | DispatchKeySet(DispatchKey.AutogradFunctionality)
    | DispatchKeySet(DispatchKey.ADInplaceOrView)
)


def arguments(overload: Any) -> list[tuple[str, str]]:
    """The name and the type of each argument of an operator."""
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def schema(overload: Any) -> str:
    """The schema of an operator as text."""
    return str(overload._schema)


def has_schema(overload: Any, text: str) -> bool:
    """Whether ``text`` is the schema of an operator."""
    return torch._C.parse_schema(text) == overload._schema


def transforming() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return transforms_active() or forward_ad._current_level >= 0


def intercepted(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether a mode, autocast or a subclass of Tensor may change a call before autograd records it."""
    return (
        torch._C._len_torch_function_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
        or torch._C._is_any_autocast_enabled()
    )


def levels() -> Counter[str]:
    """The number of active levels of each transform: ``Vmap``, ``Grad``, ``Jvp``, ``Functionalize``."""
    found = Counter(level.key().name for level in torch._C._functorch.get_interpreter_stack() or [])
    if forward_ad._current_level >= 0 and not found["Jvp"]:
        found["Jvp"] = 1
    return found


def constant(function: Any) -> Any:
    """The same as torch.compiler.assume_constant_result, without importing the compiler, which takes a second."""
    function._dynamo_marked_constant = True
    return function


@constant
def differentiating() -> bool:
    """Whether a transform other than vmap is active, while the compiler traces and enters transforms."""
    return bool(levels().keys() - {"Vmap"})


@constant
def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is running; the exporter is not imported to find out."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


@contextmanager
def with_autograd() -> Iterator[None]:
    """Let a kernel record a graph, although the dispatcher has excluded autograd before it."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS), torch.enable_grad():
        yield


def register_strategy(overload: Any, first_static: int, ways: Any) -> None:
    """Register how DTensor divides an operator.

    ``ways(args)`` takes the arguments, shapes in place of tensors. It returns pairs of placements on one axis of a
    mesh, first of the outputs and then of the arguments, and of a rule, whose ``fits(ranks)`` says whether so many
    ranks can take their parts. Arguments from ``first_static`` on are part of the key under which DTensor caches what
    it has found; ``register_sharding`` would leave out lists.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    outputs = len(overload._schema.returns)

    def strategy(op_schema: Any) -> Any:
        mesh = op_schema.get_mesh_from_args()
        found = ways([tuple(arg.shape) if isinstance(arg, OpStrategy) else arg for arg in op_schema.args_schema])
        expanded = expand_to_full_mesh_op_strategy(
            mesh, op_schema, [placements for placements, _ in found], input_index=outputs
        )
        rules = {tuple(p for p in placements if p is not None): rule for placements, rule in found}

        def fits(spec: Any) -> bool:
            results = spec.output_specs if outputs > 1 else [spec.output_specs]
            by_axis = zip(*(one.placements for one in (*results, *spec.input_specs)), strict=True)
            chosen = [rules[placements] for placements in by_axis]
            return all(
                rule.fits(prod(mesh.size(axis) for axis, other in enumerate(chosen) if other is rule))
                for rule in chosen
            )

        expanded.strategies = [spec for spec in expanded.strategies if fits(spec)]
        return expanded

    info = RuntimeSchemaInfo(first_static, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(overload, strategy, info)
