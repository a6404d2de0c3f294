"""Correctness first, then time: one row of a table is one case, forward or with backward, for several rivals."""

import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from rivals import ABSENT, OURS, PLAIN, Call, Unfit, ours, reference, rivals
from rooms import about
from torch import Tensor

from deformkit import bench

PASSES = ("forward", "forward + backward")


def cotangent(case: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        shape = ours(case, arguments).run().shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def truth(case: Any, arguments: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    exact = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return reference(case, exact).evaluate(cotangent(case, arguments))


def error(call: Call, expected: dict[str, Tensor], weights: Tensor) -> float:
    """The worst error of the output and the gradients, relative to the largest value of each."""
    found = call.evaluate(weights)
    return max(((found[name].to(e.dtype) - e).abs().max() / e.abs().max()).item() for name, e in expected.items())


def tolerance(dtype: torch.dtype) -> float:
    """Where an answer is wrong: half of the dtype's digits are."""
    return torch.finfo(dtype).eps ** 0.5


def rows(cases: Iterable[Any], names: Collection[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Ours and its rivals in float32: for each case the two passes."""
    for case in cases:
        arguments = case.arguments()
        expected, weights = truth(case, arguments), cotangent(case, arguments)
        calls, notes = {}, {}
        for name, adapter in rivals(case, names).items():
            try:
                if name in ABSENT:
                    raise Unfit("not installed")
                call = adapter(case, arguments)
            except Unfit as reason:
                notes[name] = {"skipped": str(reason)}
                continue
            if name != PLAIN:
                try:
                    worst = error(call, expected, weights)
                except Exception as failure:
                    if name == OURS:
                        raise
                    notes[name] = {"skipped": f"failed: {type(failure).__name__}"}
                    print(f"{case.name}: {name} failed: {failure}", file=sys.stderr)
                    continue
                notes[name] = {"error": worst}
                if not worst <= tolerance(torch.float32):
                    notes[name] = {"skipped": f"wrong: error {worst:.2g}", "error": worst}
                    continue
            calls[name] = call
        del expected
        for what in PASSES:
            runs = {name: call.forward() if what == PASSES[0] else call.both() for name, call in calls.items()}
            yield {**about(case), "pass": what, "rivals": timed(runs, notes, seconds)}


def half_rows(cases: Iterable[Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Ours alone, in half precision beside float32; each gated against the float32 reference at the same values."""
    for case in cases:
        calls, notes = {}, {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            arguments = case.arguments(dtype)
            call, name = ours(case, arguments), str(dtype).removeprefix("torch.")
            worst = error(call, truth(case, arguments, torch.float32), cotangent(case, arguments))
            notes[name] = {"error": worst}
            if worst <= tolerance(dtype):
                calls[name] = call
            else:
                notes[name]["skipped"] = f"wrong: error {worst:.2g}"
        for what in PASSES:
            runs = {name: call.forward() if what == PASSES[0] else call.both() for name, call in calls.items()}
            yield {**about(case), "pass": what, "rivals": timed(runs, notes, seconds)}


def timed(runs: dict[str, Any], notes: dict[str, Any], seconds: float, least: int | None = None) -> dict[str, Any]:
    timings = bench.alternate(runs, seconds, least=least)
    result: dict[str, Any] = {name: dict(note) for name, note in notes.items()}
    for name, timing in timings.items():
        low, high = timing.spread
        numbers = {"median": timing.median, "low": low, "high": high, "n": len(timing.samples)}
        result[name] = {**result.get(name, {}), **numbers}
    return result
