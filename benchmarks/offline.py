"""Compiles every Triton kernel as its launcher starts it, for GPUs that are not here: ``python benchmarks/offline.py``.

Registers, spills, shared memory and the instructions that matter are read off the machine code. ``--save`` writes them
to ``results/offline.json`` and into ``docs/gpu_developers.md``; ``--check`` holds them against what was saved and
against what has to hold anyway. Nothing is run, so nothing is said of speed.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it decides what a kernel is

import gpu_page
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from deformkit.ops._library import operators
from deformkit.ops.gpu import launch

RESULTS = Path(__file__).parent / "results" / "offline.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("float32", "float16", "bfloat16")
EVERYWAY = {
    "deform_conv": ("2d 256x56x84", "1d depthwise"),
    "deform_aggregate": ("2d 128x56x56",),
    "ms_deform_attn": ("2d encoder",),
    "deform_roi_pool": ("2d 500 RoIs",),
    "deform_sample": ("2d 64x256x256",),
}
"""The cases compiled in every dtype, with and without deterministic algorithms."""

ONCE = {
    "deform_conv": ("2d 64x128x128", "1d k5 L1024", "3d 32x16x32x32"),
    "deform_aggregate": ("1d 256x2048", "3d 64x16x32x32"),
    "ms_deform_attn": ("2d decoder", "1d", "3d"),
    "deform_roi_pool": ("2d 100 RoIs adaptive", "1d 200 segments", "3d 50 cuboids"),
    "deform_sample": ("1d 64x4096", "3d 16x64x64x64", "3d one channel 160x192x160"),
}
"""The cases compiled in one dtype: other numbers of axes, other sizes of blocks."""

MORE_REGISTERS = 16
"""How many more registers than saved are let pass."""


FEWEST = 50
"""What the compiler cannot compile it may replace by a trap: a kernel of fewer instructions is none."""


@dataclass(frozen=True)
class Job:
    """One case of an operator in one dtype, forward and backward, for one target; if deterministic, backward alone."""

    operator: str
    case: str
    dtype: str
    deterministic: bool
    target: str


class Driver:
    """Stands in for the driver of a GPU: says what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def jobs() -> list[Job]:
    return [
        Job(operator, case, dtype, deterministic, target)
        for target in TARGETS
        for operator in EVERYWAY
        for cases, ways in (
            (EVERYWAY[operator], product(DTYPES, (False, True))),
            (ONCE[operator], [("float16", False)]),
        )
        for case, (dtype, deterministic) in product(cases, list(ways))
    ]


def compiled(job: Job) -> list[dict[str, Any]]:
    """A row for each kernel that the launchers of a job would start."""
    cases = importlib.import_module(f"deformkit.ops.{job.operator}.cases").BENCHMARKS
    named = next(case for case in cases if case.name == job.case).arguments(dtype=getattr(torch, job.dtype))
    about = {"operator": job.operator, "case": job.case, "dtype": job.dtype, "deterministic": job.deterministic}
    return [
        {
            **about,
            "target": job.target,
            "kernel": kernel,
            "blocks": config.kwargs,
            "warps": config.num_warps,
            **look(built),
        }
        for kernel, built, config in build(job.operator, named, TARGETS[job.target], job.deterministic)
    ]


def build(
    name: str, named: dict[str, Any], target: GPUTarget, deterministic: bool
) -> list[tuple[str, Any, triton.Config]]:
    """Compile what a call of an operator would start, forward and backward; Triton's cache keeps it."""
    driver.set_active(Driver(target))
    launch._target.cache_clear()
    built = []

    def start(kernel: Any, programs: Any, arguments: dict[str, Any], config: triton.Config) -> None:
        # What was compiled for another target is kept by device alone.
        kernel.device_caches.clear()
        found = kernel.warmup(**arguments, **config.all_kwargs(), grid=(1,))
        built.append((kernel.__name__, found, config))

    operator, room = operators[name], importlib.import_module(f"deformkit.ops.{name}.gpu")
    args = [value.to("meta") if isinstance(value, Tensor) else value for value in operator.ordered(named)]
    before, launch.start = launch.start, start
    torch.use_deterministic_algorithms(deterministic)
    try:
        if not deterministic:  # forward it makes no difference
            room.forward(*args)
        output = operator.overload(*args)
        room.backward(output, *args, [args[i] is not None for i in operator.differentiable])
    finally:
        launch.start = before
        torch.use_deterministic_algorithms(False)
    return built


def look(built: Any) -> dict[str, Any]:
    """What the machine code of a kernel needs and has."""
    if "cubin" in built.asm:
        return {"shared": built.metadata.shared, **_look_at_cubin(built.asm["cubin"])}
    text = built.asm["amdgcn"]
    counts = {key: int(found) for key, found in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)}
    opcodes = Counter(re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)", text, re.MULTILINE))
    return {
        "shared": built.metadata.shared,
        "registers": counts["vgpr_count"],
        "instructions": opcodes.total(),
        "spilled": counts["vgpr_spill_count"] + counts["sgpr_spill_count"],
        "atomics": {name: n for name, n in sorted(opcodes.items()) if "atomic" in name},
        "matrix": {name: n for name, n in sorted(opcodes.items()) if "mfma" in name},
    }


def _look_at_cubin(code: bytes) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    counts = {key: int(found) for key, found in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing.stdout, re.MULTILINE))
    return {
        "registers": counts["REG"],
        "instructions": opcodes.total(),
        # Bytes: a stack is where registers go that there are not.
        "spilled": counts["STACK"] + counts["LOCAL"],
        "atomics": {name: n for name, n in sorted(opcodes.items()) if re.match(r"REDG?\.|ATOMG?\.", name)},
        "matrix": {name: n for name, n in sorted(opcodes.items()) if re.match(r"\w*(HMMA|HGMMA|UTC\w*MMA)", name)},
    }


def name(row: dict[str, Any]) -> str:
    """Which kernel a row is about; different for each."""
    how = ", deterministic" if row["deterministic"] else ""
    return f"{row['target']}: {row['kernel']} of {row['operator']} {row['case']}, {row['dtype']}{how}"


def problems(rows: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with kernels whatever they were, then what is worse than it was."""
    before = {name(row): row for row in saved}
    for row in rows:
        if row["instructions"] < FEWEST:
            yield f"{name(row)}: {row['instructions']} instructions, which cannot be all"
        if row["spilled"]:
            yield f"{name(row)}: spills {row['spilled']}"
        wanted, there = _widest_wanted(row), widest(row["atomics"])
        if there and wanted and there < wanted:
            yield f"{name(row)}: adds {there} numbers at once instead of {wanted}: {row['atomics']}"
        if row["operator"] == "deform_conv" and "depthwise" not in row["case"] and not row["matrix"]:
            yield f"{name(row)}: no matrix instructions"
        old = before.get(name(row))
        if old is None:
            yield f"{name(row)}: not in {RESULTS.name}; python benchmarks/offline.py --save"
        elif row["registers"] > old["registers"] + MORE_REGISTERS:
            yield f"{name(row)}: {row['registers']} registers, up from {old['registers']}"


def widest(atomics: dict[str, int]) -> int:
    """How many float32 numbers the widest atomic addition takes."""
    return max((int((re.findall(r"F32x(\d)", opcode) or ["1"])[0]) for opcode in atomics), default=0)


def _widest_wanted(row: dict[str, Any]) -> int:
    """How many float32 numbers should be added at once.

    Whole numbers have no vectors, nor has a gfx942; nor is there more than one where each channel has its own points,
    or where there is one channel.
    """
    vectors = row["target"] in ("sm_90", "sm_100") and not row["deterministic"]
    single = any(words in row["case"] for words in ("depthwise", "one channel"))
    return 4 if vectors and not single else 0


def everything(processes: int, chosen: Sequence[Job]) -> list[dict[str, Any]]:
    rows = []
    with ProcessPoolExecutor(processes) as pool:
        for n, found in enumerate(pool.map(compiled, chosen), 1):
            rows += found
            print(f"\r{n} of {len(chosen)} calls compiled", end="" if n < len(chosen) else "\n", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--only", default="", help="jobs with this in 'operator case dtype target'")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="fail if a kernel is not as it should be")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name} and docs/gpu_developers.md")
    options = parser.parse_args()
    chosen = [job for job in jobs() if options.only in f"{job.operator} {job.case} {job.dtype} {job.target}"]
    rows = everything(options.processes, chosen)
    if options.save:
        saved = json.dumps({"triton": triton.__version__, "rows": rows}, indent=1)
        RESULTS.write_text(saved + "\n")
        gpu_page.save()
    elif not options.check:
        print(json.dumps(rows, indent=1))
    saved = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    found = list(problems(rows, saved))
    print(f"{len(rows)} kernels, {len(found)} problems", *found, sep="\n", file=sys.stderr)
    if options.check and found:
        sys.exit(1)


if __name__ == "__main__":
    main()
