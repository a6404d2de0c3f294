"""What runs here, and whether it computes what it should: a block of text to paste into a bug report.

Needs nothing but torch: ``python -c "from deformkit.doctor import report; print(report())"``.
"""

import importlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, _kernels
from ._testing import FLOOR, evaluate
from .ops import gpu
from .ops._library import NAMESPACE, Operator, operators
from .ops._torch import has_kernel

DTYPES = (torch.float32, torch.bfloat16)
_FAILURES_SHOWN = 12
_SPEAKING_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Check:
    """One case of one operator against the float64 reference."""

    operator: str
    axes: int
    device: str
    dtype: torch.dtype
    case: str
    error: float
    problem: str | None

    @property
    def name(self) -> str:
        """What was checked, in words."""
        return f"{self.operator}, case {self.case}, {_short(self.dtype)} on {self.device}"


@dataclass(frozen=True)
class Diagnosis:
    """The report, and whether the self-test passed."""

    text: str
    healthy: bool


def report() -> str:
    """The text of :func:`diagnose`."""
    return diagnose().text


def diagnose() -> Diagnosis:
    """Look at the machine, at the kernels that are registered, and test them: about two seconds."""
    start = time.perf_counter()
    checks = list(self_test())
    seconds = time.perf_counter() - start
    failed = [check for check in checks if check.problem]
    verdict = f"{len(failed)} of {len(checks)} checks FAILED" if failed else f"passed, {len(checks)} checks"
    sections = [
        "### deformkit doctor",
        _table(["what", "found"], list(_surroundings())),
        "Which kernel answers:",
        _table(["operator", *devices()], list(_answers())),
        "Why not another:",
        "\n".join(f"- {line}" for line in _reasons()),
        f"Self-test against the float64 reference, values and gradients: {verdict}, {seconds:.1f} s. "
        "The figure is the worst error, relative to the largest value.",
        _table(["operator", "device", *map(_short, DTYPES)], list(_verdicts(checks))),
        *(["\n".join(_failures(failed))] if failed else []),
    ]
    return Diagnosis("\n\n".join(sections), healthy=not failed)


def devices() -> list[str]:
    """The kinds of device to speak of: the CPU, CUDA, and another accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return list(dict.fromkeys(["cpu", "cuda", *([accelerator.type] if accelerator else [])]))


def kernel(operator: str, device: str) -> str:
    """What answers a call of ``operator``, by name, with tensors on ``device``."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not has_kernel(f"{NAMESPACE}::{operator}", key):
        return "reference"
    return "Triton" if key == "CUDA" else f"C++ {_kernels.selection.isa or 'from elsewhere'}"


def self_test() -> Iterator[Check]:
    """Run the cases of every operator, forward and backward, on each device that is here.

    That is every case on the CPU, and elsewhere one for each number of axes: there, each has kernels to be compiled.
    """
    for name, cases in _cases().items():
        for device in devices():
            if _present(device):
                for case in cases if device == "cpu" else _one_each(cases):
                    for dtype in DTYPES:
                        yield _check(operators[name], case, dtype, device)


def _one_each(cases: Sequence[Any]) -> list[Any]:
    """The first case of each number of axes."""
    return list({case.axes: case for case in reversed(cases)}.values())


def _check(operator: Operator, case: Any, dtype: torch.dtype, device: str) -> Check:
    about = (operator.name, case.axes, device, dtype, case.name)
    try:
        args = operator.ordered(case.arguments(dtype=dtype))
        positions = [i for i in operator.differentiable if args[i] is not None]
        truth, reference, actual = (
            evaluate(function, _moved(args, **to), positions, torch.bfloat16)
            for function, to in (
                (operator.reference, {"dtype": torch.float64}),
                (operator.reference, {}),
                (operator, {"device": device}),
            )
        )
    except Exception as failure:  # whatever a broken installation raises is what the report is for
        return Check(*about, float("nan"), f"{type(failure).__name__}: {failure}")
    worst, problems = 0.0, []
    parts = ["output", *(f"gradient of {operator.arguments[i]}" for i in positions)]
    for part, true, middle, found in zip(parts, truth, reference, actual, strict=True):
        scale = true.abs().max().item()
        error = (found.cpu().double() - true).abs().max().item()
        allowed = 2 * (middle.double() - true).abs().max().item() + FLOOR[dtype] * scale
        if not error <= allowed:
            problems.append(f"{part} is off by {error:.2g} at values up to {scale:.2g}; allowed are {allowed:.2g}")
        worst = max(worst, error / scale if scale else error, key=_badness)
    return Check(*about, worst, "; ".join(problems) or None)


def _moved(args: Sequence[Any], **to: Any) -> list[Any]:
    return [value.to(**to) if isinstance(value, Tensor) else value for value in args]


def _cases() -> dict[str, list[Any]]:
    names = [name for name in operators if not name.endswith("_backward")]
    return {name: importlib.import_module(f"{__package__}.ops.{name}.cases").CASES for name in names}


def _surroundings() -> Iterator[list[str]]:
    yield ["deformkit", __version__]
    yield ["Python", f"{platform.python_version()} ({platform.python_implementation()})"]
    yield ["torch", torch.__version__]
    yield ["triton", _installed("triton") or _installed("pytorch-triton") or "not installed"]
    yield ["system", f"{platform.system()} {platform.release()}, {platform.machine()}"]
    yield ["processor", processor()]
    yield ["instruction set", f"{_kernels.selection.capability} by torch; kernels: {_kernels.selection.isa or 'none'}"]
    yield ["threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        yield [f"cuda:{index}", torch.cuda.get_device_name(index)]
    for name in _SPEAKING_VARIABLES:
        if name in os.environ:
            yield [name, os.environ[name]]


def processor() -> str:
    """The name of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _answers() -> Iterator[list[str]]:
    for name, cases in _cases().items():
        for axes in sorted({case.axes for case in cases}):
            yield [f"{name} {axes}-D", *(_answer(name, device) for device in devices())]


def _answer(name: str, device: str) -> str:
    forward, backward = kernel(name, device), kernel(f"{name}_backward", device)
    both = forward if forward == backward else f"{forward}; backward: {backward}"
    return both if _present(device) else f"{both} (no such device here)"


def _reasons() -> Iterator[str]:
    for isa, reason in _kernels.selection.reasons.items():
        yield f"C++ {isa}: {reason}"
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield f"CUDA: torch, built {built}, sees no device"
    if not gpu.available():
        yield "Triton: not installed, so the reference would answer on a GPU"
    if torch.version.hip:
        yield f"ROCm {torch.version.hip}: the Triton kernels compile for it, and have never been run on it"
    for name in operators:
        for device in devices():
            if _present(device) and kernel(name, device) == "reference":
                yield f"{name} on {device}: no kernel is registered, so the reference answers"


def _verdicts(checks: Sequence[Check]) -> Iterator[list[str]]:
    for name, axes, device in dict.fromkeys((check.operator, check.axes, check.device) for check in checks):
        row = []
        for dtype in DTYPES:
            these = [c for c in checks if (c.operator, c.axes, c.device, c.dtype) == (name, axes, device, dtype)]
            worst = max((c.error for c in these), key=_badness)
            row.append(f"{'FAIL' if any(c.problem for c in these) else 'pass'} {worst:.1e}")
        yield [f"{name} {axes}-D", device, *row]


def _badness(error: float) -> tuple[bool, float]:
    """NaN is worse than any number."""
    return error != error, error


def _failures(failed: Sequence[Check]) -> Iterator[str]:
    for check in failed[:_FAILURES_SHOWN]:
        yield f"- {check.name}: {check.problem}"
    if len(failed) > _FAILURES_SHOWN:
        yield f"- and {len(failed) - _FAILURES_SHOWN} more"


def _present(device: str) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return device == "cpu" or (accelerator is not None and accelerator.type == device)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
