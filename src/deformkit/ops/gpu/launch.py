"""How a Triton kernel is started: on the device of its tensors, with the block sizes that suit that device.

Every kernel has a few candidates, the first of which a rule of its room puts there. Within :func:`autotune` Triton's
autotuner times them all instead, once for each kind of problem.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton import Config

Blocks = dict[str, int]
Programs = Callable[[Blocks], int]


class Target(NamedTuple):
    """The target of compilation: ``"cuda"``, ``"hip"`` or ``"interpreter"``, and the architecture."""

    backend: str
    arch: int | str


_autotuning = False
_tuners: dict[tuple[Any, ...], Any] = {}
"""Triton's autotuner for each kind of problem that was timed."""


def target() -> Target:
    """The target of the current device."""
    if triton.knobs.runtime.interpret:
        return Target("interpreter", 0)
    return _target(triton.runtime.driver.active.get_current_device())


@lru_cache
def _target(device: int) -> Target:
    found = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch)


@contextmanager
def autotune() -> Iterator[None]:
    """In this context, the first call for each kind of problem times all candidates of a kernel and keeps the best.

    What was found is used by later calls outside as well. Results differ between candidates by rounding alone.
    """
    global _autotuning
    before, _autotuning = _autotuning, True
    try:
        yield
    finally:
        _autotuning = before


def launch(
    kernel: Any, device: torch.device, programs: Programs, candidates: Sequence[Config], **arguments: Any
) -> None:
    """Start ``kernel`` on ``device``.

    Args:
        kernel: a function that :func:`triton.jit` compiles.
        device: where its tensors are.
        programs: how many programs there are for some block sizes, which may be none.
        candidates: block sizes by the name of the kernel's parameter, warps of a program, stages of a pipelined loop.
        arguments: all other arguments of the kernel.
    """
    if not programs(candidates[0].kwargs):
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        tuner = _tuner(kernel, device, candidates, arguments) if _autotuning or _tuners else None
        if tuner is None:
            start(kernel, programs, arguments, candidates[0])
        else:
            tuner[lambda blocks: (programs(blocks),)](**arguments)


def start(kernel: Any, programs: Programs, arguments: dict[str, Any], config: Config) -> None:
    """Start the programs of ``kernel`` on the current device."""
    kernel[(programs(config.kwargs),)](**arguments, **config.all_kwargs())


def _tuner(kernel: Any, device: torch.device, candidates: Sequence[Config], arguments: dict[str, Any]) -> Any | None:
    """The autotuner for a kind of problem, or None if the first candidate is used without timing."""
    # The same kernel, compiled alike, on tensors of about the same size.
    constants = tuple(value for name, value in arguments.items() if name.isupper())
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    kind = (kernel, device, constants, tuple((tensor.dtype, tensor.numel().bit_length()) for tensor in tensors))
    timing = _autotuning and not torch.cuda.is_current_stream_capturing()
    if timing and kind not in _tuners:
        # Accumulated outputs must not keep the sums of timed runs.
        sums = [name for name, value in arguments.items() if not isinstance(value, Tensor) and hasattr(value, "zero_")]
        _tuners[kind] = triton.autotune(list(candidates), key=[], reset_to_zero=sums)(kernel)
    tuner = _tuners.get(kind)
    return tuner if tuner and (timing or tuner.cache) else None


# About the number of threads that hides the memory latency of a large GPU.
_MANY_THREADS = 2**17


def row_configs(rows: int, times: int, channels: int, vector: int, most_parts: int = 8) -> list[Config]:
    """Candidates for a kernel whose rows are points, each with ``channels`` side by side in memory.

    What has to be known of a point is worked out by every thread of its row: the fewer there are, the better, as long
    as all rows together have threads enough. A thread reads PARTS vectors of a row; a program has ROWS of them.

    Args:
        rows: how many of them follow one another, in one image.
        times: how many such sequences of rows there are.
        channels: of a row; more than ``most_parts`` vectors of 32 threads are left to several programs or to a loop.
        vector: how many channels a thread reads at once.
        most_parts: how many vectors of a row a thread reads at most.
    """
    channels = max(channels, 1)
    if target().backend == "interpreter":
        columns = min(triton.next_power_of_2(channels), 128)
        return [Config({"ROWS": max(1024 // columns, 16), "COLUMNS": columns, "PARTS": 1, "UNROLL": 1}, 4, 1)]
    vector = min(vector, triton.next_power_of_2(channels))
    most = max(min(triton.next_power_of_2(channels) // vector, 32), 1)
    least = min(max(triton.next_power_of_2(triton.cdiv(channels, vector * most_parts)), min(2, most)), most)
    wanted = triton.next_power_of_2(triton.cdiv(_MANY_THREADS, max(rows * times, 1)))
    threads = min(max(wanted, least), most)
    configs = []
    for share, warps, unroll in (
        ((threads, 8, 1) if threads >= wanted else (threads, 4, 2)),
        *((t, w, 1) for t in (least, most) for w in (2, 4, 8)),
    ):
        parts = min(triton.cdiv(channels, vector * share), most_parts)
        tile = min(warps * 32 // share, max(triton.next_power_of_2(rows), 1))
        blocks = {"ROWS": tile, "COLUMNS": vector * share, "PARTS": parts, "UNROLL": unroll}
        config = Config(blocks, max(min(warps, tile * share // 32), 1), 1)
        if config not in configs:
            configs.append(config)
    return configs
