"""Compiles small C++ libraries for tests like the kernels."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent


def compiled(name: str, folder: Path, *options: str) -> Path:
    """Compile ``native/<name>.cpp`` to a shared library in ``folder``; skip if there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / f"{name}.so"
    includes = [f"-I{ROOT / 'src/deformkit/ops'}", "-isystem", str(TORCH / "include")]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-psabi", *includes, target, *options]
    subprocess.run(
        [*command, str(ROOT / "tests/native" / f"{name}.cpp"), "-o", str(library), "-ldl"],
        check=True,
        capture_output=True,
        text=True,
    )
    return library
