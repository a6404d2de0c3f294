"""Times the operators on a GPU: ``python benchmarks/gpu.py [--out DIR]``; ``gpu.sh`` runs it after the tests.

Correctness comes first: each time is listed with the largest error of output and gradients against the float64
reference. Without a GPU everything runs in Triton's interpreter on tiny sizes, whose times mean nothing.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gpu_page
import offline
import red
import torch
import triton
from gpu_cases import DTYPES, Workload, workloads
from gpu_clock import Clock, CudaClock
from gpu_rivals import ABSENT, COMPILED, OURS, adapters
from triton.runtime import driver

from deformkit import __version__
from deformkit._testing import half_of_digits
from deformkit._testing.gate import error
from deformkit._testing.rivals import Call, Unfit, reference

PASSES = ("forward", "forward + backward")
RED_ROWS = 2**20


def main() -> None:
    options = _options()
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would be timed
    on_gpu = torch.cuda.is_available() and not options.interpret
    clock, device = (CudaClock(), "cuda") if on_gpu else (Clock(), "cpu")
    document: dict[str, Any] = {**origin(on_gpu), "red": [], "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    if on_gpu:
        # The kernels of a case do not depend on its points.
        _compile(list({w.case: w for w in reversed(workloads()) if options.only in f"{w.operator} {w.case}"}.values()))
    with contextlib.nullcontext() if on_gpu else _interpreter():
        for part in ("red", "rows") if not options.only else ("rows",):
            for row in _part(part, clock, device, options, end):
                # The file is written after each row, so that an interrupted run keeps its results.
                document[part].append(row)
                (options.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
                (options.out / "gpu.md").write_text(gpu_page.measured(document) + "\n")
    document["clocks_after"] = clocks(on_gpu)
    (options.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    print((options.out / "gpu.md").read_text())
    if options.save:
        gpu_page.MEASURED.write_text((options.out / "gpu.json").read_text())
        gpu_page.save()
    if not all("error" in row["rivals"][OURS] for row in document["rows"]) or not all(
        r["right"] for r in document["red"]
    ):
        sys.exit("deformkit failed, or was wrong, at a call above")


def _compile(chosen: Sequence[Workload]) -> None:
    """Compile the kernels for this GPU in many processes instead of one after the other."""
    target = driver.active.get_current_target()
    jobs = [(w, dtype, exact) for w in chosen for dtype in DTYPES[w.operator] for exact in (False, True)]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_compile_one, *zip(*jobs, strict=True), repeat(target)):
            pass


def _compile_one(workload: Workload, dtype: torch.dtype, deterministic: bool, target: Any) -> None:
    torch.set_num_threads(1)
    offline.build(workload.operator, workload.arguments(dtype, "cpu"), target, deterministic)


def _part(part: str, clock: Clock, device: str, options: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    if part == "red":
        yield from red.rates(clock, device, RED_ROWS if device == "cuda" else 128, options.each)
        return
    seen: set[str] = set()
    for workload in workloads(small=device != "cuda"):
        if options.only not in f"{workload.operator} {workload.case}":
            continue
        for dtype in DTYPES[workload.operator]:
            if time.monotonic() > end:
                print(f"out of time before {workload.operator} {workload.case}", file=sys.stderr)
                return
            print(f"{workload.operator} {workload.case}, {workload.points}, {dtype}", file=sys.stderr, flush=True)
            # Compilation is slow, so each operator is called once.
            compiled = options.compiled and workload.operator not in seen
            seen.add(workload.operator)
            yield from _rows(workload, dtype, clock, device, options.each, compiled)


def _rows(
    workload: Workload, dtype: torch.dtype, clock: Clock, device: str, each: float, compiled: bool
) -> Iterator[dict[str, Any]]:
    arguments = workload.arguments(dtype, device)
    expected, weights = _truth(workload, arguments, device)
    found: dict[str, tuple[Call, dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    for name, adapter in adapters(workload, compiled).items():
        try:
            call = adapter(workload.case, arguments)
            worst = error(call, expected, weights)
        except Unfit as reason:
            skipped[name] = str(reason)
        except Exception as failure:  # a full GPU, or a kernel that does not compile, must not stop the other rows
            skipped[name] = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        else:
            if worst <= half_of_digits(dtype):
                found[name] = call, {"error": worst}
            else:
                skipped[name] = f"wrong: error {worst:.2g}"
    del expected
    for what in PASSES:
        rivals: dict[str, Any] = {name: {"skipped": why} for name, why in skipped.items()}
        for name, (call, note) in found.items():
            run = call.forward() if what == PASSES[0] else call.both()
            rivals[name] = {
                **note,
                "device": clock.device(run, each),
                "wall": clock.wall(run, each / 4),
                "memory": clock.memory(run),
            }
        row = {
            "operator": workload.operator,
            "case": workload.case.name,
            "sizes": str(workload.case),
            "points": workload.points,
            "dtype": str(dtype).removeprefix("torch."),
            "pass": what,
            "rivals": rivals,
        }
        if what == PASSES[1] and OURS in found:
            row["deterministic"] = _deterministic(found[OURS][0], clock, each)
        yield row


def _truth(workload: Workload, arguments: dict[str, Any], device: str) -> tuple[dict[str, Any], Any]:
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    call = reference(workload.case, exact)
    with torch.no_grad():
        shape = call.run().shape
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(device)
    return call.evaluate(weights), weights


def _deterministic(call: Call, clock: Clock, seconds: float) -> dict[str, Any]:
    """The time of forward and backward with deterministic algorithms, and whether all runs are bit-identical."""
    torch.use_deterministic_algorithms(True)
    try:
        run = call.both()
        timing, first = clock.device(run, seconds), run()
        same = all(all(map(torch.equal, run(), first)) for _ in range(clock.repeats - 1))
    finally:
        torch.use_deterministic_algorithms(False)
    return {"device": timing, "same_bits": same}


def _interpreter() -> Any:
    import triton_kernels

    return triton_kernels.instead_of_cpp()


def origin(on_gpu: bool) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    installed = {name: metadata.version(name) for name in ("torchvision", "deformops") if name not in ABSENT}
    device = {"name": "Triton's interpreter on a CPU", "interpreted": True}
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "interpreted": False,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return {
        "device": device,
        "versions": {"deformkit": __version__, **versions, **installed},
        "absent": ABSENT,
        "clocks": clocks(on_gpu),
    }


def clocks(on_gpu: bool) -> dict[str, int] | None:
    """The present and the maximum MHz of the multiprocessors; None if they are unknown."""
    if not on_gpu:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        kind = pynvml.NVML_CLOCK_SM
        return {
            "now": pynvml.nvmlDeviceGetClockInfo(handle, kind),
            "most": pynvml.nvmlDeviceGetMaxClockInfo(handle, kind),
        }
    except Exception:  # The package is missing, or the machine does not report it.
        return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the operators on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="where gpu.json and gpu.md go")
    parser.add_argument("--seconds", type=float, default=300.0, help="after how long no further case is begun")
    parser.add_argument("--each", type=float, default=0.1, help="how long to time each call")
    parser.add_argument("--only", default="", help="calls with this in 'operator case', and no rates of additions")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes in Triton's interpreter")
    parser.add_argument("--save", action="store_true", help="write results/gpu.json and docs/gpu.md as well")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help=f"without the {COMPILED}")
    options = parser.parse_args()
    if options.save and (options.interpret or not torch.cuda.is_available()):
        parser.error("there is nothing to save without a GPU")
    return options


if __name__ == "__main__":
    main()
