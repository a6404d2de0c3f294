"""How a Triton kernel is started: on the device of its tensors, with the block sizes that suit that device.

Every kernel has a few candidates, the first of which a rule of its room puts there. :func:`autotune` times them all
instead, once for each kind of problem.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Target(NamedTuple):
    """What a kernel is compiled for: ``"cuda"``, ``"hip"``, or the ``"interpreter"``, and its architecture."""

    backend: str
    arch: int | str


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of the kernel's parameter, warps of a program, stages of a pipelined loop."""

    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1


_autotuning = False
_tuned: dict[tuple[Any, ...], Config] = {}


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
    """Within, the first call with each kind of problem times all candidates of a kernel, and the best one is kept.

    What was found is used by later calls outside as well. Results differ between candidates by rounding alone.
    """
    global _autotuning
    before, _autotuning = _autotuning, True
    try:
        yield
    finally:
        _autotuning = before


def launch(
    kernel: Any,
    programs: Callable[[Config], int],
    args: Sequence[Any],
    constants: dict[str, Any],
    candidates: Sequence[Config],
) -> None:
    """Start ``kernel`` with ``programs(config)`` programs, which may be none."""
    device = next(value.device for value in args if isinstance(value, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        config = _choose(kernel, programs, args, constants, candidates, device)
        count = programs(config)
        if count:
            start(kernel, count, args, constants, config)


def start(kernel: Any, count: int, args: Sequence[Any], constants: dict[str, Any], config: Config) -> None:
    """Start ``count`` programs of ``kernel`` on the current device."""
    kernel[(count,)](*args, **constants, **config.blocks, num_warps=config.num_warps, num_stages=config.num_stages)


def _choose(
    kernel: Any,
    programs: Callable[[Config], int],
    args: Sequence[Any],
    constants: dict[str, Any],
    candidates: Sequence[Config],
    device: torch.device,
) -> Config:
    if not (_autotuning or _tuned) or device.type != "cuda":
        return candidates[0]
    # A kind of problem: the same kernel on tensors of about the same size.
    sizes = tuple((v.dtype, v.numel().bit_length()) for v in args if isinstance(v, Tensor))
    kind = (kernel.__name__, device, sizes, repr(constants))
    if kind not in _tuned:
        if not _autotuning or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        # On copies: a kernel that adds to its output must not do so twice. Some tensors stand in tuples.
        copies = tree_map_only(Tensor, torch.clone, list(args))
        times = {
            i: triton.testing.do_bench(
                lambda config=config: start(kernel, programs(config), copies, constants, config), return_mode="median"
            )
            for i, config in enumerate(candidates)
            if programs(config)
        }
        _tuned[kind] = candidates[min(times, key=times.__getitem__, default=0)]
    return _tuned[kind]


# About as many threads as keep a large GPU busy; fewer leave the latency of memory in sight.
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
        return [Config({"ROWS": max(1024 // columns, 16), "COLUMNS": columns, "PARTS": 1, "UNROLL": 1})]
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
        config = Config(blocks, num_warps=max(min(warps, tile * share // 32), 1))
        if config not in configs:
            configs.append(config)
    return configs
