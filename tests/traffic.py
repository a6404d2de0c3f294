"""Counts what a process hands to its process groups."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(NamedTuple):
    """Of a kind of collective: the number of calls, and the bytes of the whole tensors, or of what goes to others."""

    calls: int
    bytes: int


# The kind of a collective, and the number of the argument with the whole of what is communicated; None: the result.
_KINDS: dict[str, tuple[str, int | None]] = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
    "broadcast_": ("broadcast", 0),
    "all_reduce": ("all-reduce", 0),
    "all_gather_into_tensor": ("all-gather", None),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "all_to_all_single": ("all-to-all", 0),
}
# They only wait for, or receive, what another call has sent.
_SILENT = {"wait_tensor", "recv_", "barrier", "monitored_barrier_", "_wrap_tensor_autograd"}


class Traffic(TorchDispatchMode):
    """Counts the collectives that are called inside, those of DDP's reducer in C++ included."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, Sent] = {}
        self.log: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            # It calls its collectives, which then come here.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and name not in _SILENT:
            kind, place = _KINDS[name]
            whole = result if place is None else args[place]
            size = sum(t.numel() * t.element_size() for t in pytree.tree_leaves(whole) if isinstance(t, Tensor))
            if kind == "all-to-all":
                # What a rank sends to itself goes nowhere.
                splits = next(part for part in reversed(args) if isinstance(part, list))
                size -= size * splits[dist.get_rank()] // max(sum(splits), 1)
            calls, before = self.sent.get(kind, Sent(0, 0))
            self.sent[kind] = Sent(calls + 1, before + size)
            self.log.append((kind, size))
        return result
