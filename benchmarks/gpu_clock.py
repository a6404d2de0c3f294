"""The time of a call on a GPU, by events and by the clock of the CPU, and its memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Run = Callable[[], object]
_FLUSHED = 256 * 2**20


class Clock:
    """Without a GPU, every call is made once and nothing is timed."""

    repeats = 2

    def device(self, run: Run, seconds: float) -> dict[str, Any]:
        run()
        return {}

    def wall(self, run: Run, seconds: float) -> dict[str, Any]:
        return {}

    def memory(self, run: Run) -> int | None:
        return None


class CudaClock(Clock):
    """Medians in seconds. Before each sample of device time the cache is overwritten."""

    repeats = 10

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")

    def device(self, run: Run, seconds: float) -> dict[str, Any]:
        """Time from the start of the first kernel to the end of the last, without launch gaps if there is a graph."""
        replay, how = _graph(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            self._flushed.zero_()
            start.record()
            replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return {**_summary(_repeat(sample, seconds)), "by": how}

    def wall(self, run: Run, seconds: float) -> dict[str, Any]:
        def both() -> None:
            run()
            torch.cuda.synchronize()

        both()
        return _summary(_repeat(lambda: _outside(both), seconds))

    def memory(self, run: Run) -> int | None:
        """The peak of allocated bytes, less those allocated before and those of the results."""
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, torch.Tensor)]
        torch.cuda.synchronize()
        returned = sum({leaf.data_ptr(): leaf.untyped_storage().nbytes() for leaf in kept}.values())
        return max(0, torch.cuda.max_memory_allocated() - before - returned)


def _graph(run: Run) -> tuple[Run, str]:
    """The call captured as a CUDA graph, or the call itself if it cannot be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, "events"

    def replay() -> object:
        graph.replay()
        return kept

    return replay, "graph"


def _repeat(sample: Callable[[], float], seconds: float, least: int = 10, most: int = 200) -> list[float]:
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < end and len(samples) < most):
        samples.append(sample())
    return samples


def _outside(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _summary(samples: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": statistics.median(samples), "low": low, "high": high, "n": len(samples)}
