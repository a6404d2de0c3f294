"""Timing of calls that take turns in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHORTEST_SAMPLE = 1e-3


@dataclass(frozen=True)
class Timing:
    """Seconds per call, several times over."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile; of a single sample, the sample."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def alternate(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    most: int = 30,
    least: int | None = None,
    wait: Callable[[], object] | None = None,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time each call in turn, round after round, so that other load on the machine affects all of them alike.

    Args:
        calls: the calls to time, by name. Each is made once before, untimed.
        seconds: how long to spend on each.
        most: the largest number of samples.
        least: the smallest number of samples; None: five, or three of a call that takes more than a second.
        wait: waits for the device on which the calls run; None for the CPU.
        rest: seconds in which threads that another call has left spinning go to sleep; an untimed call follows, before
            each sample.
    """
    repeats, counts = {}, {}
    for name, call in calls.items():
        call()
        estimate = _time(call, 1, wait)
        repeats[name] = max(1, round(_SHORTEST_SAMPLE / estimate))
        fewest = (5 if estimate < 1 else 3) if least is None else least
        counts[name] = min(most, max(fewest, int(seconds / (estimate * repeats[name]))))
    rounds = max(counts.values(), default=0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, call in calls.items():
                # Fewer samples than rounds are spread over all the rounds.
                if (turn + 1) * counts[name] // rounds > turn * counts[name] // rounds:
                    if rest:
                        time.sleep(rest)
                        call()
                    samples[name].append(_time(call, repeats[name], wait))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def _time(call: Callable[[], object], repeats: int, wait: Callable[[], object] | None) -> float:
    if wait:
        wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if wait:
        wait()
    return (time.perf_counter() - start) / repeats


def without_gradients(call: Callable[[], Tensor]) -> Callable[[], object]:
    """``call`` without a graph, as in inference."""

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def with_gradients(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
    """``call`` and its backward to all ``leaves``, which must require gradients."""
    cotangent = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, cotangent)
