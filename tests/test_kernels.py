"""The loader of CPU kernels."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from native_library import compiled
from rooms import needs_kernels

import deformkit
from deformkit._kernels import ISAS, LIBRARY, selection

LEVELS = ["DEFAULT", "AVX2", "AVX512"]
BEST = next(i for i in reversed(range(3)) if LEVELS[i] in (torch.backends.cpu.get_cpu_capability(), "DEFAULT"))
# A process in which a library was loaded cannot unload it, but copies of it choose again.
CHOOSE = """
import json, os, pathlib, sys, warnings
import torch
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from deformkit._kernels import load
chosen = {}
for name, (roots, capability) in json.loads(sys.argv[1]).items():
    os.environ["ATEN_CPU_CAPABILITY"] = capability
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load(roots, "")
    chosen[name] = [found.isa, str(found.path), found.reasons, [str(w.message) for w in caught]]
print(json.dumps(chosen))
"""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """For each situation the instruction set that is chosen, its path, the reasons, and the warnings."""
    folder = tmp_path_factory.mktemp("libraries")

    def root(name: str, isas: tuple[str, ...] = ISAS, broken: tuple[str, ...] = ()) -> str:
        lib = folder / name / "lib"
        lib.mkdir(parents=True)
        assert selection.library is not None
        if LIBRARY in broken:
            (lib / LIBRARY).write_text("not an ELF file")
        elif isas:
            shutil.copy(selection.library, lib)
        for isa in isas:
            if isa in broken:
                (lib / f"deformkit_{isa}.so").write_text("not an ELF file")
            else:
                (lib / f"deformkit_{isa}.so").symlink_to(selection.library.with_name(f"deformkit_{isa}.so"))
        return str(folder / name)

    situations = {
        "all": ([root("all")], ""),
        "avx2": ([root("limited")], "avx2"),
        "default": ([root("least")], "default"),
        "baseline": ([root("one", ("baseline",))], ""),
        "second": ([root("sources", ()), root("installed", ("baseline",))], ""),
        "broken": ([root("broken", broken=ISAS[2 - BEST : 3 - BEST])], ""),
        "nothing": ([root("nothing", ())], ""),
        "no library": ([root("text", (), (LIBRARY,))], ""),
    }
    done = subprocess.run([sys.executable, "-c", CHOOSE, json.dumps(situations)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: [*found[name], Path(roots[-1]) / "lib"] for name, (roots, _) in situations.items()}


def isa_of(capability: str) -> str:
    """The kernels for a capability, or those for this processor if that has less."""
    return ISAS[2 - min(BEST, LEVELS.index(capability))]


@needs_kernels
@pytest.mark.parametrize(("situation", "capability"), [("all", "AVX512"), ("avx2", "AVX2"), ("default", "DEFAULT")])
def test_the_best_library_that_the_processor_runs(
    chosen: dict[str, list[Any]], situation: str, capability: str
) -> None:
    isa, path, reasons, warned, lib = chosen[situation]
    assert isa == isa_of(capability) and path == str(lib / f"deformkit_{isa}.so") and not warned
    assert set(reasons) == set(ISAS) - {isa}
    for other, reason in reasons.items():
        better = ISAS.index(other) < ISAS.index(isa)
        excluded = reason in ("ATEN_CPU_CAPABILITY excludes it", "this processor does not support it")
        assert excluded if better else reason == f"{isa} is loaded, which is better"


@needs_kernels
def test_the_next_best_where_one_was_not_built(chosen: dict[str, list[Any]]) -> None:
    isa, _, reasons, warned, _ = chosen["baseline"]
    assert isa == "baseline" and not warned
    for other, reason in reasons.items():
        if LEVELS[2 - ISAS.index(other)] in LEVELS[: BEST + 1]:
            assert reason.startswith(f"no deformkit_{other}.so beside ") and reason.endswith("it was not built")
        else:
            assert reason == "this processor does not support it"


@needs_kernels
def test_libraries_in_any_of_the_package_directories(chosen: dict[str, list[Any]]) -> None:
    _, path, _, _, lib = chosen["second"]
    assert path == str(lib / "deformkit_baseline.so") and lib.parts[-2] == "installed"


@needs_kernels
def test_one_warning_without_a_library_says_how_to_compile_it(chosen: dict[str, list[Any]]) -> None:
    isa, path, reasons, (said,), lib = chosen["nothing"]
    assert f"uses the slow reference because no library of kernels for this processor is in {lib}" in said
    assert "run `pip install --force-reinstall --no-deps .`" in said and "g++ >= 12" in said
    assert isa is None and path == "None" and set(reasons) == set(ISAS)


@needs_kernels
def test_a_broken_library_is_named_and_the_next_one_loaded(chosen: dict[str, list[Any]]) -> None:
    isa, _, reasons, (said,), _ = chosen["broken"]
    broken = ISAS[2 - BEST]
    assert isa == (ISAS[3 - BEST] if BEST else None)
    assert f"because a library of kernels does not load. deformkit_{broken}.so: " in said and "pip install" in said
    assert f"uses {f'the {isa} library' if isa else 'the slow reference'} because" in said
    assert "does not load" in reasons[broken]


@needs_kernels
def test_kernels_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    assert selection.library is not None and selection.isa is not None
    shutil.copy(selection.library, tmp_path / "lib")
    compiled("other_version", tmp_path).rename(tmp_path / "lib" / f"deformkit_{selection.isa}.so")
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, json.dumps({"mixed": ([str(tmp_path)], "")})], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    isa, _, _, (said,) = json.loads(done.stdout)["mixed"]
    version = f"it is of deformkit 0.0.7, and what loads it of {deformkit.__version__}: reinstall deformkit"
    assert isa is None and f"deformkit_{selection.isa}.so: {version}" in said


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="ldd is a program of Linux")
@pytest.mark.parametrize("which", ["kernels", "onnxruntime"])
def test_libraries_need_no_framework(which: str) -> None:
    assert selection.path is not None
    library = selection.path if which == "kernels" else selection.path.with_name("deformkit_onnxruntime.so")
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in linked
    # Without the addresses, among whose digits "c10" may be.
    names = re.sub(r"\(0x[0-9a-f]+\)", "", linked)
    assert not any(name in names for name in ("torch", "c10", "python", "libonnxruntime"))


@needs_kernels
def test_no_private_operator_is_called() -> None:
    """Their schemas change without notice, and a call by an older schema reads beyond its arguments."""
    assert selection.library is not None
    names = set(re.findall(rb"(?:aten|mkldnn|onednn|prims?|quantized)::\w+", selection.library.read_bytes()))
    assert names == {b"aten::empty"}


@needs_kernels
def test_a_file_that_is_no_library(chosen: dict[str, list[Any]]) -> None:
    isa, _, reasons, (said,), _ = chosen["no library"]
    assert isa is None and "uses the slow reference" in said and f"{LIBRARY}: " in said
    assert all(f"{LIBRARY} does not load" in reason for reason in reasons.values())


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


def test_import_survives_a_broken_library(tmp_path: Path) -> None:
    """Replace the directories of the package by one with a broken library."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / LIBRARY).write_text("not an ELF file")
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
@needs_kernels
@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_every_instruction_set_passes_the_self_test(capability: str) -> None:
    if LEVELS.index(capability.upper()) > BEST:
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
