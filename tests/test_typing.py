"""The types that a type checker sees in a user's program."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="needs mypy")

PROGRAM = """
import torch
import deformkit as dk

def run(images: torch.Tensor) -> torch.Tensor:
    layer = dk.nn.PackedDeformConv2d(64, 128, 3, padding=1, modulated=True)
    points = layer.sampling_locations(layer.predict(images)[0])
    weight, zeros = torch.randn(8, 64, 3, 3), torch.zeros(2, 18, 32, 32)
    reveal_type(points)
    reveal_type(dk.deform_conv2d(images, zeros, weight, padding=1))
    output: torch.Tensor = layer(images)
    return output
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of mypy for all programs, because analysing torch takes most of the time."""
    return tmp_path_factory.mktemp("mypy")


def check(tmp_path: Path, cache: Path, program: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "program.py"
    file.write_text(program)
    # mypy's editable finder does not follow import hooks: MYPYPATH stands for an installed package with its marker.
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", str(file)]
    return subprocess.run([sys.executable, "-m", "mypy", *options], capture_output=True, text=True, cwd=tmp_path)


def test_a_program_is_checked_strictly(tmp_path: Path, cache: Path) -> None:
    done = check(tmp_path, cache, PROGRAM)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('Revealed type is "torch._tensor.Tensor"') == 2, done.stdout


def test_a_wrong_argument_is_found(tmp_path: Path, cache: Path) -> None:
    done = check(tmp_path, cache, PROGRAM.replace("padding=1))", "padding='one'))"))
    assert done.returncode == 1
    assert "[arg-type]" in done.stdout, done.stdout
