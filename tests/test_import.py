import subprocess
import sys

HEAVY = ("torch._dynamo", "triton", "transformers", "deformkit.compat", "numpy.testing", "matplotlib", "typer")


def test_import_takes_nothing_along_that_only_some_calls_need() -> None:
    program = "import torch, sys; before = set(sys.modules); import deformkit\n"
    program += f"print(*(name for name in {HEAVY!r} if name in sys.modules and name not in before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
