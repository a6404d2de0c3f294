"""The wheel supports every Python, and needs no compiler."""

import os
import platform
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import deformkit

ROOT = Path(__file__).parent.parent
SMOKE = """
import sys, deformkit, torch
from deformkit._kernels import selection
from deformkit.doctor import report
assert selection.isa, selection
assert deformkit.library_path().startswith(sys.prefix), deformkit.library_path()
assert deformkit.__file__.startswith(sys.prefix), deformkit.__file__
input, weight = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(6, 4, 3, 3)
output = deformkit.deform_conv2d(input, torch.zeros(2, 18, 9, 8), weight, padding=1)
torch.testing.assert_close(output, torch.nn.functional.conv2d(input, weight, padding=1), atol=1e-4, rtol=1e-4)
output.sum().backward()
assert input.grad.isfinite().all()
print(report())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # What an editable install has compiled is not compiled again.
    options = ["--quiet", "--no-build-isolation", "--no-deps"]
    # The pip 23.0 of Debian 12 does not know the short form of this option.
    options += ["--config-settings", "cmake.define.DEFORMKIT_ISAS=native"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    libraries = {f"deformkit/lib/{name}.so" for name in ("deformkit_baseline", "libdeformkit", "deformkit_onnxruntime")}
    assert (libraries | {"deformkit/lib/cmake/deformkit/deformkitConfig.cmake"}) <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h"))]


def test_the_types_are_in_it(wheel: Path) -> None:
    assert "deformkit/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_its_description_stands_alone(wheel: Path) -> None:
    """A relative link leads nowhere on the page of a package index."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == deformkit.__version__
    description = metadata.get_payload()
    assert "deformkit" in description
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", description)


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="about Linux on x86-64")
def test_it_runs_on_the_systems_that_torch_runs_on(wheel: Path) -> None:
    """The wheels of torch are manylinux_2_28. The library states its requirements, whoever compiled it."""
    pytest.importorskip("auditwheel", reason="needs auditwheel")
    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = {
        library: max(
            tuple(map(int, version.split("."))) for version in re.findall(rf"'{library}_([\d.]+)'", done.stdout)
        )
        for library in ("GLIBC", "GLIBCXX", "CXXABI")
    }
    assert needed["GLIBC"] <= (2, 28) and needed["GLIBCXX"] <= (3, 4, 25) and needed["CXXABI"] <= (1, 3, 11), needed


def test_it_serves_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", str(clean)], check=True)
    python = clean / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    # The installed torch is used; the packages of the clean environment come first.
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "torch_home.pth").write_text(str(Path(torch.__file__).parents[1]))
    environment = {"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "")}
    run = subprocess.run([python, "-c", SMOKE], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "passed" in run.stdout and "FAIL" not in run.stdout
