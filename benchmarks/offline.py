"""Compiles every Triton kernel as its launcher starts it, for absent GPUs: ``python benchmarks/offline.py``.

Registers, spills, shared memory and important instructions are read from the machine code. ``--save`` writes them
to ``results/offline.json`` and into ``docs/gpu_developers.md``; ``--check`` compares them with the saved ones and with
fixed limits. Nothing is run, so this says nothing about speed.
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
    # This must come before Triton is imported, because it determines the kind of kernels.
    os.environ.pop("TRITON_INTERPRET", None)

import gpu_page
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from deformkit.ops._operator import operators
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
    "deform_roi_pool": ("2d 100 RoIs adaptive", "2d 300 RoIs of 49 groups", "1d 200 segments", "3d 50 cuboids"),
    "deform_sample": ("1d 64x4096", "3d 16x64x64x64"),
}
"""The cases compiled in one dtype: other numbers of axes, other sizes of blocks."""

MORE_REGISTERS = 16
"""How many more registers than saved are let pass."""


FEWEST = 50
"""What the compiler cannot compile it may replace by a trap: a kernel of fewer instructions is none."""


@dataclass(frozen=True)
class Job:
    """One case of an operator in one dtype, forward and backward, for one target; only backward if deterministic."""

    operator: str
    case: str
    dtype: str
    deterministic: bool
    target: str

    def __str__(self) -> str:
        how = " deterministic" if self.deterministic else ""
        return f"{self.operator} {self.case} {self.dtype} {self.target}{how}"


class Driver:
    """Stands in for the driver of a GPU and names the target to compile for."""

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
    """Compile the kernels that a call of an operator would start, forward and backward, into Triton's cache."""
    driver.set_active(Driver(target))
    launch._target.cache_clear()
    built = []

    def start(kernel: Any, programs: Any, arguments: dict[str, Any], config: triton.Config) -> None:
        # Triton stores compiled kernels by device only, so those for another target have to go.
        kernel.device_caches.clear()
        found = kernel.warmup(**arguments, **config.all_kwargs(), grid=(1,))
        built.append((kernel.__name__, found, config))

    operator, room = operators[name], importlib.import_module(f"deformkit.ops.{name}.gpu")
    args = [value.to("meta") if isinstance(value, Tensor) else value for value in operator.ordered(named)]
    before, launch.start = launch.start, start
    torch.use_deterministic_algorithms(deterministic)
    try:
        if not deterministic:  # The forward pass is the same.
            room.forward(*args)
        output = operator.overload(*args)
        room.backward(output, *args, [args[i] is not None for i in operator.differentiable])
    finally:
        launch.start = before
        torch.use_deterministic_algorithms(False)
    return built


def look(built: Any) -> dict[str, Any]:
    """The resources and instructions of the machine code of a kernel."""
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
        # In bytes: missing registers are spilled to the stack.
        "spilled": counts["STACK"] + counts["LOCAL"],
        "atomics": {name: n for name, n in sorted(opcodes.items()) if re.match(r"REDG?\.|ATOMG?\.", name)},
        "matrix": {name: n for name, n in sorted(opcodes.items()) if re.match(r"\w*(HMMA|HGMMA|UTC\w*MMA)", name)},
    }


def name(row: dict[str, Any]) -> str:
    """The unique name of the kernel of a row."""
    how = ", deterministic" if row["deterministic"] else ""
    return f"{row['target']}: {row['kernel']} of {row['operator']} {row['case']}, {row['dtype']}{how}"


def problems(rows: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> Iterator[str]:
    """First the kernels that exceed a limit, then those that are worse than the saved ones."""
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
    """The number of float32 values in the widest atomic addition."""
    return max((int((re.findall(r"F32x(\d)", opcode) or ["1"])[0]) for opcode in atomics), default=0)


def _widest_wanted(row: dict[str, Any]) -> int:
    """The number of float32 values that should be added at once.

    Integers have no vectors, and neither has a gfx942. If each channel has its own points, values are added one by one.
    """
    vectors = row["target"] in ("sm_90", "sm_100") and not row["deterministic"]
    return 4 if vectors and "depthwise" not in row["case"] else 0


def everything(processes: int, chosen: Sequence[Job]) -> list[dict[str, Any]]:
    rows = []
    with ProcessPoolExecutor(processes) as pool:
        for n, found in enumerate(pool.map(compiled, chosen), 1):
            rows += found
            print(f"\r{n} of {len(chosen)} calls compiled", end="" if n < len(chosen) else "\n", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--only", default="", help="jobs whose 'operator case dtype target[ deterministic]' this finds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="fail if a kernel is not as it should be")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name} and docs/gpu_developers.md")
    options = parser.parse_args()
    chosen = [job for job in jobs() if re.search(options.only, str(job))]
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
