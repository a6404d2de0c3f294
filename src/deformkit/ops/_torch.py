"""All private symbols of torch that the operators use, with the releases of torch on which each was tested."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.autograd import forward_ad

# TorchScript's type of a list that may be given as one number: 2.13.
BroadcastingList1, BroadcastingList2, BroadcastingList3 = (
    getattr(torch._jit_internal, f"BroadcastingList{axes}") for axes in (1, 2, 3)
)
any_requires_grad = torch._C._any_requires_grad  # 2.13
below_autograd = torch._C._AutoDispatchBelowAutograd  # 2.13
DispatchKey = torch._C.DispatchKey  # 2.13
DispatchKeySet = torch._C.DispatchKeySet  # 2.13
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # 2.13
has_storage = torch._C._has_storage  # 2.13: whether a tensor lies in memory that torch manages
tracing = torch._C._is_tracing  # 2.13
transforms_active = torch._C._are_functorch_transforms_active  # 2.13
without_keys = torch._C._ExcludeDispatchKeyGuard  # 2.13
wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # 2.13: whether torch.func hides a tensor's values

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
    """The name and the type of each argument of an operator. ``OpOverload._schema``: 2.13."""
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def schema(overload: Any) -> str:
    """The schema of an operator as text. ``OpOverload._schema``: 2.13."""
    return str(overload._schema)


def has_schema(overload: Any, text: str) -> bool:
    """Whether ``text`` is the schema of an operator. ``torch._C.parse_schema``: 2.13."""
    return torch._C.parse_schema(text) == overload._schema


def transforming() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active. All: 2.13."""
    return transforms_active() or forward_ad._current_level >= 0


def intercepted(*tensors: torch.Tensor | None) -> bool:
    """Whether a mode, autocast or a subclass of Tensor may change a call before autograd records it.

    ``_len_torch_function_stack``, ``_is_any_autocast_enabled``: 2.13.
    """
    return (
        torch._C._len_torch_function_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
        or torch._C._is_any_autocast_enabled()
    )


def levels() -> Counter[str]:
    """The number of active levels of each transform: ``Vmap``, ``Grad``, ``Jvp``, ``Functionalize``. All: 2.13."""
    found = Counter(level.key().name for level in torch._C._functorch.get_interpreter_stack() or [])
    if forward_ad._current_level >= 0 and not found["Jvp"]:
        found["Jvp"] = 1
    return found


def constant(function: Any) -> Any:
    """The same as torch.compiler.assume_constant_result, without importing the compiler, which takes a second: 2.13."""
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
    """Let a kernel record a graph, although the dispatcher has excluded autograd before it. All: 2.13."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS), torch.enable_grad():
        yield


def register_strategy(overload: Any, first_static: int, ways: Any) -> None:
    """Register how DTensor divides an operator. All: 2.13.

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
