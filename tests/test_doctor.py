"""The report of ``deformkit doctor``."""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deformkit import _kernels, doctor
from deformkit.ops._operator import operators

FORWARD = [name for name in operators if not name.endswith("_backward")]


def test_every_operator_dtype_and_dimension_is_tested() -> None:
    checks = list(doctor.self_test())
    assert [check for check in checks if check.problem] == []
    cpu = {(check.operator, check.axes, check.dtype) for check in checks if check.device == "cpu"}
    assert cpu == {(name, axes, dtype) for name in FORWARD for axes in (1, 2, 3) for dtype in doctor.DTYPES}


def test_report() -> None:
    steps = []
    diagnosis = doctor.diagnose(lambda done, total: steps.append((done, total)))
    assert diagnosis.healthy
    assert steps == [(done, len(steps)) for done in range(len(steps))] and len(steps) > 2 * 3 * len(FORWARD)
    head, verdict, *_ = diagnosis.text.split("\n\n")
    if _kernels.selection.isa:
        assert head == f"### deformkit doctor: all {len(steps)} checks passed"
        assert verdict == f"The CPU uses the C++ {_kernels.selection.isa} kernels."
        page = Path(__file__).parents[1] / "docs/install.md"
        # A GPU has checks of its own.
        assert head in page.read_text() or torch.cuda.is_available()
    else:
        assert head.endswith("passed, but slow") and _kernels.CURE in " ".join(verdict.split())
    for part in (torch.__version__, doctor.processor(), "Self-test", *(f"{name} 2-D" for name in FORWARD)):
        assert part in diagnosis.text
    for isa, reason in _kernels.selection.reasons.items():
        assert f"- C++ {isa}: {reason}" in " ".join(diagnosis.text.split())
    assert "\x1b" not in diagnosis.text


def test_the_report_fits_a_terminal() -> None:
    lines = doctor.report().splitlines()
    wide = [line for line in lines if len(line) > 79 and doctor.processor() not in line]
    assert not wide


def test_the_verdict_says_how_to_compile_missing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor._kernels, "selection", _kernels.Selection("AVX2"))
    head, verdict = doctor._verdict(0, 7)
    assert head == "all 7 checks passed, but slow"
    assert verdict.startswith("No compiled kernels are in use on the CPU") and verdict.endswith(_kernels.CURE)
    assert doctor._verdict(2, 7)[0] == "2 of 7 checks FAILED"


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    operator = operators[FORWARD[0]]
    monkeypatch.setattr(type(operator), "__call__", lambda self, *args: self.reference(*args) * wrong)
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    said = "output has " if math.isnan(wrong) else "output is off by"
    assert "FAILED" in diagnosis.text.split("\n\n")[0] and said in " ".join(diagnosis.text.split())


def test_a_kernel_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *args: object) -> None:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(type(operators[FORWARD[0]]), "__call__", fail)
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert "RuntimeError: an illegal instruction" in " ".join(diagnosis.text.split())


def test_which_kernel_is_used() -> None:
    expected = f"C++ {_kernels.selection.isa}" if _kernels.selection.isa else "reference"
    for name in operators:
        assert doctor.kernel(name, "cpu") == expected
        assert doctor.kernel(name, "meta") == "reference"


def test_the_report_names_what_a_gpu_would_need(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = "\n".join(doctor._reasons())
    assert ("sees no device" in reasons) != torch.cuda.is_available()
    assert ("Triton: not installed" in reasons) != bool(find_spec("triton"))
    monkeypatch.setattr(doctor.gpu, "available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reasons = "\n".join(doctor._reasons())
    assert "Triton: not installed; the reference implementation would be used on a GPU" in reasons
    assert "ROCm 6.4: the Triton kernels compile for it and have never been run on it" in reasons


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_triton_kernels_are_used_on_a_gpu() -> None:
    for name in operators:
        assert doctor.kernel(name, "cuda") == "Triton"


def test_other_devices_are_tested_with_one_case_for_each_number_of_axes() -> None:
    for cases in doctor._cases().values():
        chosen = doctor._one_each(cases)
        assert sorted(case.axes for case in chosen) == [1, 2, 3]
        assert all(case in cases for case in chosen)


def test_needs_torch_alone() -> None:
    program = """
import sys
for name in ("typer", "rich", "matplotlib", "sklearn", "numpy"):
    sys.modules[name] = None
from deformkit.doctor import report
print(report())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "### deformkit doctor" in done.stdout
