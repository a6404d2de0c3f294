"""What a small call costs beyond its kernel.

The kernel is the operator as the dispatcher calls it below autograd, with no Python in between but torch's own reading
of the arguments. The public function is the whole way: checks, autograd, and in the last row the backward. All on one
thread: calls this small gain nothing from a second, and waking it is not what is asked about.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from rivals import ABSENT, OURS, PLAIN, RIVALS, Unfit

from deformkit import bench
from deformkit.ops._library import operators
from deformkit.ops.deform_conv.cases import Case

SMALL = [
    Case("1d small", 1, 8, (16,), 8, (3,), padding=1, modulated=False),
    Case("2d small", 1, 8, (8, 8), 8, (3, 3), padding=1),
    Case("3d small", 1, 4, (4, 4, 4), 4, (3, 3, 3), padding=1),
]


def rows(cases: Iterable[Any], seconds: float) -> Iterator[dict[str, Any]]:
    forward, backward = operators["deform_conv"], operators["deform_conv_backward"]
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in cases:
        calls = {}
        for name in (OURS, PLAIN, "torchvision", "dc1d"):
            try:
                if name not in ABSENT:
                    calls[name] = RIVALS[name](case, case.arguments())
            except Unfit:
                continue
        arguments = case.arguments()
        args = [arguments[name] for name in forward.arguments]
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
            timings = bench.alternate({"kernel": partial(_below_autograd, kernels), **by_rival}, seconds, most=200)
            times = {name: timing.median for name, timing in timings.items()}
            over = times[OURS] - times["kernel"]
            yield {"case": case.name, "sizes": str(case), "pass": what, "times": times, "overhead": over}
    torch.set_num_threads(default)


def _below_autograd(kernels: Iterable[Callable[[], object]]) -> None:
    with torch._C._AutoDispatchBelowAutograd():
        for kernel in kernels:
            kernel()
