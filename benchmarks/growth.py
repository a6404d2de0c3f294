"""How time grows with the batch, with the positions and with the threads; and whether the bits stay."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from measure import PASSES, cotangent
from rivals import OURS, RIVALS

from deformkit import bench

FACTORS = (1, 2, 4, 8, 16)


def size_rows(base: Any, seconds: float, factors: Iterable[int] = FACTORS) -> Iterator[dict[str, Any]]:
    """Time at each multiple of the smallest batch, and of its positions along the first axis; on one thread."""
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    kinds: dict[str, Callable[[int], Any]] = {
        "batch": lambda factor: replace(base, batch=base.batch * factor),
        "positions": lambda factor: replace(base, size=(base.size[0] * factor, *base.size[1:])),
    }
    for kind, grown in kinds.items():
        calls = {factor: RIVALS[OURS](grown(factor), grown(factor).arguments()) for factor in factors}
        for what in PASSES:
            runs = {str(f): call.forward() if what == PASSES[0] else call.both() for f, call in calls.items()}
            times = {int(name): timing.median for name, timing in bench.alternate(runs, seconds).items()}
            # Against twice the base, below which the cost of a call itself and of waking threads shows.
            start = sorted(times)[1]
            linear = {factor: time / times[start] * start / factor for factor, time in times.items()}
            yield {"case": base.name, "sizes": str(base), "grows": kind, "pass": what, "times": times, "linear": linear}
    torch.set_num_threads(default)


def thread_rows(cases: Iterable[Any], seconds: float) -> Iterator[dict[str, Any]]:
    """One thread against two, in turn; and the same bits at one, two and three."""
    default = torch.get_num_threads()
    for case in cases:
        arguments = case.arguments()
        call, weights = RIVALS[OURS](case, arguments), cotangent(case, arguments)

        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call.evaluate(weights))
        same = all(torch.equal(other[name], value) for name, value in results[0].items() for other in results[1:])
        for what in PASSES:
            run = call.forward() if what == PASSES[0] else call.both()
            timings = bench.alternate({str(threads): _at(threads, run) for threads in (1, 2)}, seconds)
            times = {name: timing.median for name, timing in timings.items()}
            speedup = times["1"] / times["2"]
            result = {"times": times, "speedup": speedup, "same": same}
            yield {"case": case.name, "sizes": str(case), "pass": what, **result}
        torch.set_num_threads(default)


def _at(threads: int, run: Callable[[], object]) -> Callable[[], object]:
    def counted() -> object:
        torch.set_num_threads(threads)
        return run()

    return counted
