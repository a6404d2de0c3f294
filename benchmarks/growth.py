"""How time grows with the batch, with the positions and with the threads; and whether the bits stay."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from deformkit._testing.cases import about, operator
from deformkit._testing.gate import cotangent
from deformkit._testing.rivals import ours
from deformkit._testing.timing import alternate
from deformkit.bench import PASSES
from deformkit.ops.deform_aggregate import cases as aggregate
from deformkit.ops.deform_conv import cases as conv
from deformkit.ops.deform_roi_pool import cases as roi
from deformkit.ops.deform_sample import cases as sample
from deformkit.ops.ms_deform_attn import cases as attn

FACTORS = (1, 2, 4, 8, 16)
GROWING = [
    conv.Case("2d 64x48x48", 1, 64, (48, 48), 64, (3, 3), padding=1),
    conv.Case("1d k5 L2048", 1, 128, (2048,), 128, (5,), padding=2, modulated=False),
    attn.Case("2d Q1024", 1, ((32, 32), (16, 16)), 1024, 4, 16, (4, 4), reach=0.0),
    aggregate.Case("2d 128x32x32", 1, (32, 32), 4, 32, (3, 3), padding=1),
    roi.Case("2d 128 RoIs", 1, 64, (25, 42), 128, (7, 7), 1 / 8, bin_size=3.0),
    sample.Case("2d 16x64x64", 1, 16, (64, 64), (64, 64), spread=1.0),
]
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "deform_conv": {"batch": ("batch",), "positions": ("size",)},
    "ms_deform_attn": {"batch": ("batch",), "queries": ("queries",)},
    "deform_aggregate": {"batch": ("batch",), "positions": ("size",)},
    "deform_roi_pool": {"batch": ("batch", "rois"), "RoIs": ("rois",)},
    "deform_sample": {"batch": ("batch",), "points": ("out_size",)},
}
"""What can grow, and the fields of a case that make it grow; of a size its first axis."""


def size_rows(base: Any, seconds: float, factors: Iterable[int] = FACTORS) -> Iterator[dict[str, Any]]:
    """Time at each multiple of the base, kind by kind; on one thread."""
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind, fields in KINDS[operator(base)].items():
        cases = {factor: _grown(base, fields, factor) for factor in factors}
        calls = {factor: ours(case, case.arguments()) for factor, case in cases.items()}
        for what in PASSES:
            runs = {str(f): call.forward() if what == PASSES[0] else call.both() for f, call in calls.items()}
            times = {int(name): timing.median for name, timing in alternate(runs, seconds).items()}
            # Against twice the base, below which the cost of a call itself and of waking threads shows.
            start = sorted(times)[1]
            linear = {factor: time / times[start] * start / factor for factor, time in times.items()}
            yield {**about(base), "grows": kind, "pass": what, "times": times, "linear": linear}
    torch.set_num_threads(default)


def _grown(base: Any, fields: Iterable[str], factor: int) -> Any:
    values = {field: getattr(base, field) for field in fields}
    return replace(
        base, **{f: (v[0] * factor, *v[1:]) if isinstance(v, tuple) else v * factor for f, v in values.items()}
    )


def thread_rows(cases: Iterable[Any], seconds: float) -> Iterator[dict[str, Any]]:
    """One thread against two, in turn; and the same bits at one, two and three."""
    default = torch.get_num_threads()
    for case in cases:
        arguments = case.arguments()
        call, weights = ours(case, arguments), cotangent(case, arguments)

        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call.evaluate(weights))
        same = all(torch.equal(other[name], value) for name, value in results[0].items() for other in results[1:])
        for what in PASSES:
            run = call.forward() if what == PASSES[0] else call.both()
            timings = alternate({str(threads): _at(threads, run) for threads in (1, 2)}, seconds)
            times = {name: timing.median for name, timing in timings.items()}
            speedup = times["1"] / times["2"]
            yield {**about(case), "pass": what, "times": times, "speedup": speedup, "same": same}
        torch.set_num_threads(default)


def _at(threads: int, run: Callable[[], object]) -> Callable[[], object]:
    def counted() -> object:
        torch.set_num_threads(threads)
        return run()

    return counted
