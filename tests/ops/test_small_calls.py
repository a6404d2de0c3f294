"""A small call stays on the thread that makes it, for other threads may be asleep or their processors busy."""

import os
import subprocess
import sys

import pytest
from rooms import needs_kernels

PROGRAM = """
import os
import torch
import deformkit
from deformkit._testing.cases import ROOMS, tiny
from deformkit.ops._operator import operators

torch.set_num_threads(2)
for name in ROOMS:
    forward, backward = operators[name], operators[f"{name}_backward"]
    for case in tiny(name):
        args = forward.ordered(case.arguments())
        shape = forward.overload(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]).shape
        grad, asked = torch.zeros(shape), [args[i] is not None for i in forward.differentiable]
        before = len(os.listdir("/proc/self/task"))
        with torch._C._AutoDispatchBelowAutograd():
            forward.overload(*args)
            backward.overload(grad, *args, asked)
        if len(os.listdir("/proc/self/task")) > before:
            print(name)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lists the threads of OpenMP, in /proc")
@pytest.mark.parametrize("spread", [False, True])
def test_a_small_call_starts_no_thread(spread: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "DEFORMKIT_SPREAD_SMALL_CALLS"}
    if spread:
        environment["DEFORMKIT_SPREAD_SMALL_CALLS"] = "1"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The first call that starts threads leaves them to the others.
    assert len(done.stdout.splitlines()) == spread, done.stdout
