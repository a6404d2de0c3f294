"""The report of what runs here."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from deformkit import _kernels, doctor
from deformkit.ops._library import operators

FORWARD = [name for name in operators if not name.endswith("_backward")]


def test_every_operator_dtype_and_dimension_is_tested() -> None:
    checks = list(doctor.self_test())
    assert [check for check in checks if check.problem] == []
    cpu = {(check.operator, check.axes, check.dtype) for check in checks if check.device == "cpu"}
    assert cpu == {(name, axes, dtype) for name in FORWARD for axes in (1, 2, 3) for dtype in doctor.DTYPES}


def test_report() -> None:
    diagnosis = doctor.diagnose()
    assert diagnosis.healthy
    for part in (torch.__version__, doctor.processor(), "Self-test", "passed", *(f"{name} 2-D" for name in FORWARD)):
        assert part in diagnosis.text
    for isa, reason in _kernels.selection.reasons.items():
        assert f"- C++ {isa}: {reason}" in diagnosis.text
    assert "\x1b" not in diagnosis.text


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    operator = operators[FORWARD[0]]
    monkeypatch.setattr(type(operator), "__call__", lambda self, *args: self.reference(*args) * wrong)
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert "FAILED" in diagnosis.text and "FAIL" in diagnosis.text and "output is off by" in diagnosis.text


def test_a_kernel_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *args: object) -> None:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(type(operators[FORWARD[0]]), "__call__", fail)
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert "RuntimeError: an illegal instruction" in diagnosis.text


def test_which_kernel_answers() -> None:
    expected = f"C++ {_kernels.selection.isa}" if _kernels.selection.isa else "reference"
    for name in operators:
        assert doctor.kernel(name, "cpu") == expected
        assert doctor.kernel(name, "meta") == "reference"


def test_what_a_gpu_would_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = "\n".join(doctor._reasons())
    assert ("sees no device" in reasons) != torch.cuda.is_available()
    assert ("Triton: not installed" in reasons) != bool(find_spec("triton"))
    monkeypatch.setattr(doctor.gpu, "available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reasons = "\n".join(doctor._reasons())
    assert "Triton: not installed, so the reference would answer on a GPU" in reasons
    assert "ROCm 6.4: the Triton kernels compile for it, and have never been run on it" in reasons


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_triton_answers_on_a_gpu() -> None:
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
