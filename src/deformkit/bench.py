"""Timing of calls that take turns in one process, and a short benchmark of the operators against others.

The full one, against other libraries and with its correctness gate, is ``benchmarks/run.py`` in the repository.
"""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .ops._library import Operator, operators

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
        """The first and the third quartile."""
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def alternate(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, most: int = 30, least: int | None = None
) -> dict[str, Timing]:
    """Time each call in turn, round after round, so that what slows the machine down slows all of them.

    Args:
        calls: what to time, by name. Each is called once before, untimed.
        seconds: how long to spend on each.
        most: how many times at most.
        least: how many times at least; None: five times, a call of more than a second three times.
    """
    repeats, counts = {}, {}
    for name, call in calls.items():
        call()
        estimate = _time(call, 1)
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
                    samples[name].append(_time(call, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def without_gradients(call: Callable[[], Tensor]) -> Callable[[], object]:
    """``call`` as in inference."""

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def with_gradients(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
    """``call`` and its backward to all ``leaves``, which must require gradients."""
    cotangent = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, cotangent)


def plain_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    **deformation: Any,
) -> Tensor:
    """The convolution of the same shape that does not deform: how fast a deformable one could hope to be."""
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[input.dim() - 3]
    return function(input, weight, bias, stride, padding, dilation, input.shape[1] // weight.shape[1])


PLAIN = {"deform_conv": plain_convolution}


def quick(seconds: float = 0.5) -> Iterator[tuple[str, Any, str, dict[str, Timing]]]:
    """Time one case of each operator and number of axes, of one sample: ours, the reference, and the plain counterpart.

    The reference takes up to seconds a call: a call that is longer than ``seconds`` is timed once.

    Yields:
        The operator's name, the case, ``"forward"`` or ``"forward + backward"``, and the timings by rival.
    """
    for name, operator in operators.items():
        if not name.endswith("_backward"):
            benchmarks = importlib.import_module(f"{__package__}.ops.{name}.cases").BENCHMARKS
            cases = [replace(case, batch=1) for case in benchmarks]
            for axes in sorted({case.axes for case in cases}):
                case = min((case for case in cases if case.axes == axes), key=_size)
                for what, timings in _quick(operator, case, seconds):
                    yield name, case, what, timings


def _quick(operator: Operator, case: Any, seconds: float) -> Iterator[tuple[str, dict[str, Timing]]]:
    named = case.arguments()
    differentiable = [operator.arguments[i] for i in operator.differentiable]
    leaves = {key: named[key].requires_grad_() for key in differentiable if named[key] is not None}
    args = operator.ordered(named)
    calls: dict[str, Callable[[], Tensor]] = {
        "deformkit": lambda: operator(*args),
        "reference": lambda: operator.reference(*args),
    }
    wanted = {key: list(leaves.values()) for key in calls}
    plain = PLAIN.get(operator.name)
    if plain is not None:
        calls["plain"] = lambda: plain(**named)
        wanted["plain"] = [leaves[key] for key in ("input", "weight", "bias") if key in leaves]
    yield "forward", alternate({key: without_gradients(call) for key, call in calls.items()}, seconds, least=1)
    both = {key: with_gradients(call, wanted[key]) for key, call in calls.items()}
    yield "forward + backward", alternate(both, seconds, least=1)


def _size(case: Any) -> int:
    return sum(value.numel() for value in case.arguments().values() if isinstance(value, Tensor))
