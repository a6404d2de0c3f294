"""Peak memory of one call beyond its inputs, outputs and gradients.

Each figure comes from a separate process, which runs this file as a program. It makes the inputs, makes the
same call once on a tiny case, so that libraries, threads and their buffers exist, resets the kernel's high-water
mark of resident memory, makes the call, and reads the mark. The increase, less the output and, with backward,
the cotangent and the gradients, is the workspace in pages, whatever allocated them. glibc is told to map every block
above 64 KiB separately, so that freed memory is returned instead of being reused unseen. Linux only.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from deformkit._testing.cases import ROOMS, about, operator, tiny
from deformkit._testing.rivals import ABSENT, Unfit, rivals
from deformkit.bench import PASSES
from deformkit.ops.deform_aggregate import cases as aggregate
from deformkit.ops.deform_conv import cases as conv
from deformkit.ops.deform_roi_pool import cases as roi
from deformkit.ops.deform_sample import cases as sample
from deformkit.ops.ms_deform_attn import cases as attn

HUGE = [
    conv.Case("2d 64x1024x1024", 1, 64, (1024, 1024), 64, (3, 3), padding=1),
    conv.Case("2d 256x128x128 B8", 8, 256, (128, 128), 256, (3, 3), padding=1),
    conv.Case("1d k5 L200000", 4, 64, (200000,), 64, (5,), padding=2, modulated=False),
    conv.Case("3d 32x64x128x128", 1, 32, (64, 128, 128), 32, (3, 3, 3), padding=1),
    attn.Case("2d Q20000", 1, ((256, 256), (128, 128), (64, 64), (32, 32)), 20000, 8, 32, (4, 4, 4, 4), reach=0.0),
    attn.Case("3d 64x64x64", 1, ((64, 64, 64), (32, 32, 32)), 20000, 8, 32, (4, 4), reach=0.0),
    aggregate.Case("2d 128x512x512", 1, (512, 512), 4, 32, (3, 3), padding=1),
    aggregate.Case("1d 256x200000", 1, (200000,), 8, 32, (5,), padding=2),
    aggregate.Case("3d 64x32x64x64", 1, (32, 64, 64), 4, 16, (3, 3, 3), padding=1),
    roi.Case("2d 4000 RoIs", 2, 256, (200, 334), 4000, (7, 7), 1 / 4, bin_size=6.0),
    roi.Case("3d 500 cuboids", 1, 64, (32, 100, 168), 500, (7, 7, 7), 1 / 4, bin_size=3.0),
    sample.Case("2d 64x1024x1024", 1, 64, (1024, 1024), (1024, 1024), spread=1.0),
    sample.Case("3d 4x160x192x160", 1, 4, (160, 192, 160), (160, 192, 160), spread=1.0),
]
MIB = 2**20
_SEPARATE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def rows(cases: Iterable[Any], names: Collection[str], threads: int) -> Iterator[dict[str, Any]]:
    for case in cases:
        for what in PASSES:
            found = {name: _child(case, name, what, threads) for name in rivals(case, names)}
            yield {**about(case), "pass": what, "rivals": found}


def _child(case: Any, name: str, what: str, threads: int) -> dict[str, Any]:
    if name in ABSENT:
        return {"skipped": "not installed"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), operator(case), str(case), name, what, str(threads)],
        env={**os.environ, **_SEPARATE_BLOCKS},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"skipped": f"failed: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _measure(case: Any, name: str, what: str) -> dict[str, Any]:
    adapter, small = rivals(case, [name])[name], tiny(operator(case))[case.axes - 1]
    try:
        _once(adapter(small, small.arguments()), what)
        call = adapter(case, case.arguments())
    except Unfit as reason:
        return {"skipped": str(reason)}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = _once(call, what)
    rise = _resident("VmHWM") - before
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    return {"workspace": max(0, rise - expected), "kept": expected}


def _once(call: Any, what: str) -> list[torch.Tensor]:
    if what == PASSES[0]:
        with torch.no_grad():
            return [call.run()]
    output = call.run()
    weights = torch.ones_like(output)
    return [output, weights, *torch.autograd.grad(output, list(call.leaves.values()), weights)]


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    family, wanted, rival, which, count = sys.argv[1:]
    torch.set_num_threads(int(count))
    huge = [case for case in HUGE if operator(case) == family]
    known = [*ROOMS[family].BENCHMARKS, *huge, *tiny(family)]
    print(json.dumps(_measure(next(case for case in known if str(case) == wanted), rival, which)))
