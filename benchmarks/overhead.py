"""The cost of a small call beyond its kernel.

The kernel is the operator as the dispatcher calls it below autograd, without Python in between except torch's parsing
of the arguments. The public function includes checks, autograd, and in the last row the backward pass.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from deformkit._testing.cases import about, operator
from deformkit._testing.rivals import ABSENT, OURS, Unfit, rivals
from deformkit._testing.timing import alternate
from deformkit.ops._operator import operators


def rows(cases: Iterable[Any], names: Collection[str], seconds: float) -> Iterator[dict[str, Any]]:
    for case in cases:
        forward, backward = operators[operator(case)], operators[f"{operator(case)}_backward"]
        calls = {}
        for name, adapter in rivals(case, names).items():
            try:
                if name not in ABSENT:
                    calls[name] = adapter(case, case.arguments())
            except Unfit:
                continue
        args = forward.ordered(case.arguments())
        asked = [args[i] is not None for i in forward.differentiable]
        grad = torch.ones_like(forward(*args))
        alone = [partial(forward.overload, *args), partial(backward.overload, grad, *args, asked)]
        runs = {
            "without gradients": {name: call.forward() for name, call in calls.items()},
            "with gradients": {name: call.run for name, call in calls.items()},
            "with gradients and backward": {name: call.both() for name, call in calls.items()},
        }
        for what, by_rival in runs.items():
            kernels = alone if what.endswith("backward") else alone[:1]
            timings = alternate({"kernel": partial(_below_autograd, kernels), **by_rival}, seconds, most=200)
            times = {name: timing.median for name, timing in timings.items()}
            over = times[OURS] - times["kernel"]
            yield {**about(case), "pass": what, "times": times, "overhead": over}


def _below_autograd(kernels: Iterable[Callable[[], object]]) -> None:
    with torch._C._AutoDispatchBelowAutograd():
        for kernel in kernels:
            kernel()
