"""Which kernels are in use on this machine, and whether their results are right: a text to paste into a bug report.

It needs nothing but torch: ``python -c "from deformkit.doctor import report; print(report())"``.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _environment, _kernels
from ._environment import paragraph, table
from ._environment import processor as processor
from ._testing import compare, evaluate
from .ops import gpu
from .ops._operator import NAMESPACE, Operator, operators
from .ops._torch import has_kernel

DTYPES = (torch.float32, torch.bfloat16)
_FAILURES_SHOWN = 12


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


def diagnose(progress: Callable[[int, int], None] | None = None) -> Diagnosis:
    """Look at the machine and at the kernels that are registered, and test them, which takes a few seconds.

    Args:
        progress: called before each check with the number of checks that are done, and of all.
    """
    start = time.perf_counter()
    checks = list(self_test(progress))
    seconds = time.perf_counter() - start
    failed = [check for check in checks if check.problem]
    head, verdict = _verdict(len(failed), len(checks))
    sections = [
        f"### deformkit doctor: {head}",
        paragraph(verdict),
        *(["\n".join(_failures(failed))] if failed else []),
        table(["what", "found"], list(_surroundings())),
        "Kernels in use:",
        table(["operator", *devices()], list(_answers())),
        "Kernels not in use:",
        "\n".join(paragraph(f"- {line}", "  ") for line in _reasons()),
        paragraph(
            f"Self-test, {len(checks)} checks in {seconds:.1f} s: values and gradients beside the reference "
            "implementation in float64. Each figure is the largest error relative to the largest value."
        ),
        table(["operator", "device", *map(_short, DTYPES)], list(_verdicts(checks))),
    ]
    return Diagnosis("\n\n".join(sections), healthy=not failed)


def _verdict(failed: int, checks: int) -> tuple[str, str]:
    """A headline, and what there is to be done or known."""
    isa = _kernels.selection.isa
    speed = (
        f"The CPU uses the C++ {isa} kernels." if isa else f"No compiled kernels are in use on the CPU. {_kernels.CURE}"
    )
    if failed:
        return f"{failed} of {checks} checks FAILED", f"Results may be wrong: please report this. {speed}"
    return f"all {checks} checks passed" + ("" if isa else ", but slow"), speed


def devices() -> list[str]:
    """The kinds of device to speak of: the CPU, CUDA, and another accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return list(dict.fromkeys(["cpu", "cuda", *([accelerator.type] if accelerator else [])]))


def kernel(operator: str, device: str) -> str:
    """The implementation of ``operator`` that is used for tensors on ``device``; of an adjoint, its partner's."""
    operator = operators[operator].partner or operator
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not has_kernel(f"{NAMESPACE}::{operator}", key):
        return "reference"
    return "Triton" if key == "CUDA" else f"C++ {_kernels.selection.isa or 'from elsewhere'}"


def self_test(progress: Callable[[int, int], None] | None = None) -> Iterator[Check]:
    """Run the cases of every operator, forward and backward, on each device of this machine.

    On the CPU these are all cases; elsewhere one for each number of axes, because each has kernels to be compiled.

    Args:
        progress: called before each check with the number of checks that are done, and of all.
    """
    planned = _planned()
    for done, (name, case, dtype, device) in enumerate(planned):
        if progress:
            progress(done, len(planned))
        yield _check(operators[name], case, dtype, device)


def _planned() -> list[tuple[str, Any, torch.dtype, str]]:
    """The operator, the case, the dtype and the device of every check."""
    return [
        (name, case, dtype, device)
        for name, cases in _cases().items()
        for device in filter(_present, devices())
        for case in (cases if device == "cpu" else _one_each(cases))
        for dtype in DTYPES
    ]


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
        judged = compare(found.cpu(), true, middle, part)
        if judged.problem:
            problems.append(judged.problem)
        worst = max(worst, judged.error / judged.scale, key=_badness)
    return Check(*about, worst, "; ".join(problems) or None)


def _moved(args: Sequence[Any], **to: Any) -> list[Any]:
    return [value.to(**to) if isinstance(value, Tensor) else value for value in args]


def _cases() -> dict[str, list[Any]]:
    names = [name for name in operators if not name.endswith("_backward")]
    return {name: importlib.import_module(f"{__package__}.ops.{name}.cases").CASES for name in names}


def _surroundings() -> Iterator[list[str]]:
    yield from _environment.packages()
    yield ["torch", torch.__version__]
    yield from _environment.system()
    yield ["instruction set", f"{_kernels.selection.capability} by torch; kernels: {_kernels.selection.isa or 'none'}"]
    yield ["threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        yield [f"cuda:{index}", torch.cuda.get_device_name(index)]
    yield from _environment.variables()


def _answers() -> Iterator[list[str]]:
    for name, cases in _cases().items():
        for axes in sorted({case.axes for case in cases}):
            yield [f"{name} {axes}-D", *(_answer(name, device) for device in devices())]


def _answer(name: str, device: str) -> str:
    forward, backward = kernel(name, device), kernel(f"{name}_backward", device)
    both = forward if forward == backward else f"{forward}; backward: {backward}"
    return both if _present(device) else f"{both} (no device)"


def _reasons() -> Iterator[str]:
    for isa, reason in _kernels.selection.reasons.items():
        yield f"C++ {isa}: {reason}"
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield f"CUDA: torch, built {built}, sees no device"
    if not gpu.available():
        yield "Triton: not installed; the reference implementation would be used on a GPU"
    if torch.version.hip:
        yield f"ROCm {torch.version.hip}: the Triton kernels compile for it and have never been run on it"
    for name in operators:
        for device in devices():
            if _present(device) and kernel(name, device) == "reference":
                yield f"{name} on {device}: no kernel is registered; the reference implementation is used"


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
        yield paragraph(f"- {check.name}: {check.problem}", "  ")
    if len(failed) > _FAILURES_SHOWN:
        yield f"- and {len(failed) - _FAILURES_SHOWN} more"


def _present(device: str) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return device == "cpu" or (accelerator is not None and accelerator.type == device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
