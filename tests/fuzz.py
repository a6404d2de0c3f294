"""Random calls of the operators, forward and backward, compared with the reference.

``python tests/fuzz.py --calls 10000 --libraries build/sanitize-memory`` runs them on the libraries there instead
of the one that deformkit would load. After a failure ``--seed N --calls 1`` repeats its call alone.
"""

import argparse
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import random_calls
import torch
from torch import Tensor

# Before the kernels are loaded: most calls are small, and threads would not meet in them.
os.environ["DEFORMKIT_SPREAD_SMALL_CALLS"] = "1"


def run_one(seed: int, compare: bool, refuse: bool = True) -> str:
    """Make one random call and return its outcome. Raises an AssertionError if a result is wrong."""
    from deformkit._testing import assert_close
    from deformkit.ops._operator import operators

    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(draw.randint(1, 3))
    name = draw.choice(list(random_calls.GENERATORS))
    call = random_calls.GENERATORS[name](draw)
    operator, backward = operators[name], operators[name + "_backward"]

    if draw.random() < 0.15 and refuse:
        args = random_calls.spoil(draw, call.args)
        try:
            output = operator.overload(*args)
            backward.overload(output, *args, [args[i] is not None for i in operator.differentiable])
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return "refused"
        operator.check(*args)
        return "accepted"

    args = [random_calls.relayout(draw, value) for value in call.args]
    asked = [args[i] is not None and draw.random() < 0.8 for i in operator.differentiable]
    output = operator.overload(*args)
    cotangent = random_calls.relayout(draw, torch.randn(output.shape, dtype=torch.float64).to(output.dtype))
    grads = backward.overload(cotangent, *args, asked)
    names = ["output", *(f"gradient of {operator.arguments[i]}" for i in operator.differentiable)]
    for what, result in zip(names, (output, *grads), strict=True):
        if not call.undefined:
            assert result.isfinite().all(), f"{what} is not finite although every coordinate is a number"
        assert not result.isinf().any(), f"{what} is infinite"
    if not compare:
        return "ran"

    doubles = [v.double() if isinstance(v, Tensor) else v for v in args]
    truth = [operator.reference(*doubles), *backward.reference(cotangent.double(), *doubles, asked)]
    reference = [operator.reference(*args), *backward.reference(cotangent, *args, asked)]
    for i, (what, result) in enumerate(zip(names, (output, *grads), strict=True)):
        if i == 0 or asked[i - 1]:
            assert_close(result, truth[i], reference[i], what)
    return "compared"


def run(
    calls: int, seed: int = 0, compare_every: int = 5, progress: bool = False, refuse: bool = True
) -> dict[str, int]:
    """Make ``calls`` random calls and count their outcomes. The first wrong result raises an error with its seed.

    Without ``refuse``, all calls are valid.
    """
    return outcomes(calls, seed, progress, lambda number: run_one(number, (number - seed) % compare_every == 0, refuse))


def outcomes(calls: int, seed: int, progress: bool, once: Callable[[int], str]) -> dict[str, int]:
    """Count what ``once`` returns for each of ``calls`` seeds. The first error is raised again with its seed."""
    counts: dict[str, int] = {}
    start = time.monotonic()
    for n in range(calls):
        try:
            outcome = once(seed + n)
        except Exception as error:
            raise AssertionError(f"seed {seed + n}: {error}") from error
        counts[outcome] = counts.get(outcome, 0) + 1
        if progress and (n + 1) % 500 == 0:
            print(f"{n + 1} of {calls} in {time.monotonic() - start:.0f} s: {counts}", flush=True)
    return counts


def redirect(folder: Path) -> None:
    """Let deformkit load the libraries in ``folder / "lib"``: two of a kind would register the same kernels."""
    spec = importlib.util.find_spec("deformkit")
    assert spec is not None and spec.loader is not None and spec.submodule_search_locations is not None
    spec.submodule_search_locations[:0] = [str(folder)]
    sys.modules["deformkit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["deformkit"])


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description="Random calls of the operators.")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare-every", type=int, default=5, help="compare one in so many with the reference")
    parser.add_argument("--libraries", type=Path, help="a folder whose folder lib holds the libraries to run on")
    options = parser.parse_args()
    if options.libraries:
        redirect(options.libraries.resolve(strict=True))
    from deformkit import _kernels
    from deformkit.ops._operator import operators

    for name in operators:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"deformkit::{name}", "CPU"):
            sys.exit(f"{name} has no CPU kernel: {_kernels.selection}")
    print("on", _kernels.selection.path)
    print(run(options.calls, options.seed, options.compare_every, progress=True))


if __name__ == "__main__":
    main()
