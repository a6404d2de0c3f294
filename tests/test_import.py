"""The modules that an import loads, and the message for a missing name."""

import subprocess
import sys

import pytest

import deformkit as dk

HEAVY = ("torch._dynamo", "triton", "transformers", "deformkit.compat", "numpy.testing", "matplotlib", "typer")


def test_import_does_not_import_what_only_some_calls_need() -> None:
    program = "import torch, sys; before = set(sys.modules); import deformkit\n"
    program += f"print(*(name for name in {HEAVY!r} if name in sys.modules and name not in before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"


def test_a_layer_is_in_nn() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'DeformConv2d'; it is deformkit\.nn\.DeformConv2d$"):
        _ = dk.DeformConv2d
    for name in ("deform_conv", "no_such_name"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
            getattr(dk, name)


WITHOUT_TORCH = """
import sys
sys.argv = [{program!r}, *{arguments!r}]
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Broken())
from deformkit.__main__ import main
main()
"""


def without_torch(program: str, *arguments: str, error: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.format(program=program, arguments=arguments, error=error)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("error", ["ModuleNotFoundError('No module named torch')", "OSError('libcudart.so: missing')"])
def test_doctor_without_torch(error: str) -> None:
    done = without_torch("/usr/bin/deformkit", "doctor", error=error)
    assert done.returncode == 1 and not done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("### deformkit doctor: torch does not import") and error.split("'")[1] in first
    assert any("Python" in line for line in rest) and "https://pytorch.org/get-started" in done.stdout


def test_other_commands_without_torch() -> None:
    done = without_torch("deformkit", "bench", error="ModuleNotFoundError('No module named torch')")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip().startswith("deformkit: torch does not import: No module named torch")
    assert len(done.stderr.splitlines()) == 1


def test_a_program_that_needs_torch_gets_the_error() -> None:
    done = without_torch("train.py", error="ModuleNotFoundError('No module named torch')")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named torch"
