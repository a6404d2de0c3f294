"""The loader of CPU kernels."""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deformkit
from deformkit._kernels import ISAS, load, selection


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the libraries that ``torch.ops.load_library`` loads; the content of a file can make it fail."""
    names = []

    def load_library(path: Path) -> None:
        names.append(path.name)
        if path.read_text() == "broken":
            raise OSError("undefined symbol: aoti_torch_something")

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    return names


def make(root: Path, isas: list[str], text: str = "sound") -> Path:
    (root / "lib").mkdir(parents=True, exist_ok=True)
    for isa in isas:
        (root / "lib" / f"deformkit_{isa}.so").write_text(text)
    return root


@pytest.mark.parametrize(
    ("capability", "isa"),
    [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "baseline"), ("NO AVX", "baseline"), ("SVE256", "baseline")],
)
def test_the_best_library_that_the_processor_runs(tmp_path: Path, loaded: list[str], capability: str, isa: str) -> None:
    result = load([make(tmp_path, list(ISAS))], capability)
    assert result.isa == isa
    assert result.path == tmp_path / "lib" / f"deformkit_{isa}.so"
    assert loaded == [f"deformkit_{isa}.so"]
    assert set(result.reasons) == set(ISAS) - {isa}
    for other, reason in result.reasons.items():
        assert ("is better" if ISAS.index(other) > ISAS.index(isa) else capability) in reason


def test_the_next_best_where_one_was_not_built(tmp_path: Path, loaded: list[str]) -> None:
    result = load([make(tmp_path, ["baseline"])], "AVX512")
    assert result.isa == "baseline"
    assert "not built" in result.reasons["avx512"] and "not built" in result.reasons["avx2"]


def test_libraries_in_any_of_the_package_directories(tmp_path: Path, loaded: list[str]) -> None:
    result = load([tmp_path / "sources", make(tmp_path / "installed", ["avx2"])], "AVX2")
    assert result.path == tmp_path / "installed" / "lib" / "deformkit_avx2.so"


def test_one_warning_without_a_library_says_how_to_compile_it(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        result = load([tmp_path], "AVX512")
    (warning,) = caught
    said = str(warning.message)
    assert f"uses the slow reference because no library of kernels for this processor is in {tmp_path / 'lib'}" in said
    assert "run `pip install --force-reinstall --no-deps .`" in said and "g++ >= 12" in said
    assert result.isa is None and result.path is None
    assert set(result.reasons) == set(ISAS)


def test_no_warning_with_a_library(tmp_path: Path, loaded: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load([make(tmp_path, ["baseline"])], "AVX512")
    assert loaded == ["deformkit_baseline.so"]


def test_import_without_a_library_warns_once(tmp_path: Path) -> None:
    shutil.copytree(
        Path(deformkit.__file__).parent, tmp_path / "deformkit", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # Without -S, an editable install would put its own finder first.
    program = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(torch.__file__).parents[1])!r}]
import torch, deformkit
assert deformkit.__file__.startswith({str(tmp_path)!r})
for _ in range(3):
    import importlib
    importlib.import_module("deformkit.nn")
    deformkit.deform_conv1d(torch.randn(1, 2, 9), torch.zeros(1, 3, 7), torch.randn(3, 2, 3))
"""
    site = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-S", "-W", "always", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **site},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: deformkit uses the slow reference") == 1, done.stderr


def test_a_broken_library_is_named_and_the_next_one_loaded(tmp_path: Path, loaded: list[str]) -> None:
    make(tmp_path, ["avx2", "baseline"])
    make(tmp_path, ["avx512"], "broken")
    with pytest.warns(
        RuntimeWarning, match=r"uses the avx2 library .* deformkit_avx512\.so: undefined symbol.*pip install"
    ) as caught:
        result = load([tmp_path], "AVX512")
    assert len(caught) == 1
    assert result.isa == "avx2"
    assert "undefined symbol" in result.reasons["avx512"]


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    make(tmp_path, ["baseline"], "not an ELF file")
    with pytest.warns(RuntimeWarning, match=r"uses the slow reference .* deformkit_baseline\.so"):
        result = load([tmp_path], "DEFAULT")
    assert result.isa is None
    assert "deformkit_baseline.so" in result.reasons["baseline"]


def test_import_survives_a_broken_library(tmp_path: Path) -> None:
    """Replace the directories of the package by one with a broken library."""
    make(tmp_path, list(ISAS), "not an ELF file")
    package = Path(deformkit.__file__).parent
    program = f"""
import importlib.util, sys, warnings
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
where = [{str(tmp_path)!r}, {str(package)!r}]
file = {str(package / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("deformkit", file, submodule_search_locations=where)
deformkit = sys.modules["deformkit"] = importlib.util.module_from_spec(spec)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    spec.loader.exec_module(deformkit)
assert [str(w.message) for w in caught if w.category is RuntimeWarning and "slow reference" in str(w.message)], caught
import torch
x, w = torch.randn(1, 2, 9), torch.randn(3, 2, 3)
assert torch.allclose(deformkit.deform_conv1d(x, torch.zeros(1, 3, 7), w), torch.nn.functional.conv1d(x, w), atol=1e-5)
from deformkit.doctor import kernel
assert kernel("deform_conv", "cpu") == "reference"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="instruction sets of x86")
@pytest.mark.skipif(selection.path is None, reason="no library of kernels is built")
@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_every_instruction_set_passes_the_self_test(capability: str) -> None:
    levels = ["DEFAULT", "AVX2", "AVX512"]
    if levels.index(capability.upper()) > levels.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    done = subprocess.run(
        [sys.executable, "-m", "deformkit", "doctor"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    isa = {"default": "baseline"}.get(capability, capability)
    assert f"{capability.upper()} by torch; kernels: {isa}" in done.stdout
    assert f"C++ {isa}" in done.stdout
