"""Verifies and then times a case, forward or forward and backward, for one row of a table."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from deformkit._testing import half_of_digits
from deformkit._testing.cases import about
from deformkit._testing.gate import cotangent, error, truth
from deformkit._testing.rivals import ours
from deformkit.bench import PASSES, timed


def half_rows(cases: Iterable[Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Time deformkit in half precision and float32; each result is verified against the float32 reference."""
    for case in cases:
        calls, notes = {}, {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            arguments = case.arguments(dtype)
            call, name = ours(case, arguments), str(dtype).removeprefix("torch.")
            worst = error(call, truth(case, arguments, torch.float32), cotangent(case, arguments))
            notes[name] = {"error": worst}
            if worst <= half_of_digits(dtype):
                calls[name] = call
            else:
                notes[name]["skipped"] = f"wrong: error {worst:.2g}"
        for what in PASSES:
            runs = {name: call.forward() if what == PASSES[0] else call.both() for name, call in calls.items()}
            yield {**about(case), "pass": what, "rivals": timed(runs, notes, seconds)}
