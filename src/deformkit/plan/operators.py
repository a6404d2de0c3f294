"""The operations and the bytes of every operator of a step, counted on tensors without values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .._operations import operations


class Cost(NamedTuple):
    """Calls of an operator, its operations in matrix products and elsewhere, and the bytes that it reads and writes."""

    calls: int = 0
    matrix: float = 0
    vector: float = 0
    bytes: float = 0

    def plus(self, other: "Cost") -> "Cost":
        """The sum of two costs."""
        return Cost(
            self.calls + other.calls,
            self.matrix + other.matrix,
            self.vector + other.vector,
            self.bytes + other.bytes,
        )


class Layer(NamedTuple):
    """A call of a layer: its name, the layer, the shapes of its tensors, and whether each requires a gradient."""

    name: str
    module: Any
    inputs: list[tuple[list[int], bool]]
    output: list[int]


class Step(NamedTuple):
    """A training step of a model on one GPU.

    Attributes:
        operators: costs by the name of an operator.
        layers: the calls of layers.
        activations: bytes of what the forward pass keeps for the backward pass.
        itemsize: bytes of an element of the inputs.
    """

    operators: dict[str, Cost]
    layers: list[Layer]
    activations: int
    itemsize: int


def traced(model: nn.Module, inputs: Sequence[Any]) -> Step:
    """Run a forward and a backward pass and count; on the meta device this takes no memory and no time.

    Args:
        model: the model; its parameters and ``inputs`` are on one device, such as ``"meta"``.
        inputs: the arguments of its forward.
    """
    layers: list[Layer] = []
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            storages.append(storage)  # An address is taken by another storage only if this one is freed.
        return tensor

    storages: list[Any] = []
    hooks = [
        module.register_forward_hook(_recorder(name, layers), with_kwargs=True)
        for name, module in model.named_modules()
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    ]
    try:
        with _Counter() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.backward(found, [torch.ones_like(t) for t in found])
    finally:
        for hook in hooks:
            hook.remove()
    model.zero_grad(set_to_none=True)
    itemsize = next(t.element_size() for t in pytree.tree_leaves(list(inputs)) if isinstance(t, Tensor))
    return Step(counter.found, layers, sum(kept.values()), itemsize)


def _recorder(name: str, layers: list[Layer]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if isinstance(output, Tensor):
            inputs = [(list(t.shape), t.requires_grad) for t in given]
            layers.append(Layer(name, module, inputs, list(output.shape)))

    return record


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Cost] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name in ("aten::empty", "aten::detach"):
            return result
        tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        moved = sum(t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes for t in tensors)
        namespace, name = func._schema.name.split("::")
        if namespace == "deformkit":
            matrix, vector = operations(name, args)
        elif func._overloadpacket in flop_registry:
            matrix = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            vector = 0
        else:
            matrix, vector = 0, max((t.numel() for t in tensors), default=0)
        name = name if namespace == "deformkit" else f"{namespace}.{name}"
        self.found[name] = self.found.get(name, Cost()).plus(Cost(1, matrix, vector, moved))
        return result
