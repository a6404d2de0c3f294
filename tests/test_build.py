"""Building from source: compilers, headers of the oldest torch, and messages about missing tools."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rooms import needs_kernels

from deformkit._kernels import ISAS, selection

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
SOURCES = sorted(path for folder in ("ops", "hosts") for path in (ROOT / "src/deformkit" / folder).glob("**/*.cpp"))
# An editable install leaves out the instruction sets that its processor does not run: the widest is compiled here.
WIDEST = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def oldest_torch() -> Path:
    """A folder with headers in ``include``: of torch 2.10 from ``make headers``, or else of the running torch."""
    here = Path(torch.__file__).parent
    candidates = [Path(os.environ.get("DEFORMKIT_OLDEST_TORCH", "nowhere")), Path(sys.prefix) / "torch-2.10", here]
    for folder in candidates:
        header = folder / "include" / "torch" / "headeronly" / "version.h"
        if header.is_file() and "TORCH_VERSION_MINOR 10\n" in header.read_text():
            return folder
    pytest.skip("needs the headers of torch 2.10: `make headers` fetches them (79 MB)")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_sources_compile_against_the_oldest_torch(source: Path, oldest_torch: Path, tmp_path: Path) -> None:
    definitions = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", '-DDEFORMKIT_VERSION="0"']
    folders = [f"-I{ROOT / 'src/deformkit'}", f"-I{ROOT / 'src/deformkit/ops'}", "-isystem", f"{oldest_torch}/include"]
    subprocess.run([sys.executable, PACKAGING / "schemas.py", tmp_path / "schemas.inc"], check=True)
    folders.append(f"-I{tmp_path}")
    widest = WIDEST if IS_X86 else []
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-Wno-psabi", *widest, *definitions, *folders, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def configure(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = {
        name: shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        for name in ("cmake", "ninja")
    }
    if None in tools.values():
        pytest.skip("needs cmake and ninja")
    command = [str(tools["cmake"]), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", *options]
    command.append(f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}")
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "CXXFLAGS", "LDFLAGS")}
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment})


def words(text: str) -> str:
    """Join the lines, because CMake wraps them."""
    return " ".join(text.split())


def test_without_a_compiler_the_message_says_how_to_get_one(tmp_path: Path) -> None:
    done = configure(tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0
    said = words(done.stderr)
    assert "deformkit found no C++ compiler" in said
    assert "g++ 12 or newer, or clang++ 15 or newer" in said and "apt install g++" in said
    assert "CMAKE_CXX_COMPILER could be found" not in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_asks_for_a_compiler_before_anything_is_fetched(tmp_path: Path) -> None:
    for tool in ("sh", "echo", "uname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    command = [str(shutil.which("make")), "build", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    kept = {name: value for name, value in os.environ.items() if name != "CXX"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, "PATH": str(tmp_path)})
    assert done.returncode != 0
    assert done.stderr.startswith("deformkit needs a C++ compiler, g++ 12 or newer or clang++ 15 or newer")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("compiler", "version"), [("GNU", "11.4"), ("Clang", "14.0"), ("AppleClang", "13.1"), ("MSVC", "19.44")]
)
def test_an_unsupported_compiler_is_named(tmp_path: Path, compiler: str, version: str) -> None:
    forced = [f"-DCMAKE_CXX_COMPILER_{key}={value}" for key, value in [("ID", compiler), ("VERSION", version)]]
    known = ["-DCMAKE_CXX_COMPILER=/bin/true", "-DCMAKE_CXX_COMPILER_FORCED=ON", "-DCMAKE_CXX_COMPILER_ID_RUN=ON"]
    done = configure(tmp_path, *known, *forced)
    assert done.returncode != 0
    said = words(done.stderr)
    assert (
        f"kernels need g++ 12 or newer, or clang++ 15 or newer (on Windows clang-cl); /bin/true is {compiler}" in said
    )
    assert version in said and "CXX=g++-12 pip install ." in said


def test_a_torch_that_is_too_old_is_named(tmp_path: Path) -> None:
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), (2, 9, 1), strict=True)
    header.write_text("".join(f"#define TORCH_VERSION_{name} {value}\n" for name, value in parts))
    done = configure(tmp_path, f"-DDEFORMKIT_TORCH={tmp_path / 'torch'}")
    assert done.returncode != 0
    assert f"deformkit needs torch >= 2.10; {tmp_path / 'torch'} is torch 2.9.1" in words(done.stderr)


@needs_kernels
def test_instruction_sets_that_are_compiled_for(tmp_path: Path) -> None:
    everything = "baseline;avx2;avx512" if IS_X86 else "baseline"
    native = ";".join(isa for isa in ISAS if selection.reasons.get(isa) != "this processor does not support it")
    for asked, expected in [("all", everything), ("native", native), ("avx2", "avx2"), ("native", native)]:
        done = configure(tmp_path, f"-DDEFORMKIT_ISAS={asked}", f"-DPython_EXECUTABLE={sys.executable}")
        assert done.returncode == 0, done.stderr
        assert f"-- instruction sets: {expected}\n" in done.stdout


def backend(program: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in an interpreter in which the build backend can be imported."""
    command = [sys.executable, *options, "-c", f"import sys; sys.path.insert(0, {str(PACKAGING)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def test_an_older_python_is_named() -> None:
    done = backend("sys.version_info = (3, 9, 18)\nimport deformkit_build")
    assert done.returncode == 1
    assert done.stderr.strip() == f"deformkit needs Python 3.10 or newer; {sys.executable} is Python 3.9."


def test_without_the_build_tools_the_message_says_to_leave_the_option_out() -> None:
    done = backend("sys.modules['scikit_build_core'] = None\nimport deformkit_build")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Leave the option out: `pip install .`" in done.stderr


STUB = """
import types
core = sys.modules["scikit_build_core"] = types.ModuleType("scikit_build_core")
core.build = sys.modules["scikit_build_core.build"] = types.ModuleType("scikit_build_core.build")
for name in ("build_sdist", "get_requires_for_build_sdist", "prepare_metadata_for_build_editable",
             "prepare_metadata_for_build_wheel"):
    setattr(core.build, name, None)
core.build.get_requires_for_build_wheel = core.build.get_requires_for_build_editable = lambda settings: ["cmake"]
import deformkit_build
"""


def test_the_torch_around_an_isolated_build_is_found() -> None:
    """pip builds like this: with the interpreter of the environment, but without its packages (-S here)."""
    program = (
        "import importlib.util; assert importlib.util.find_spec('torch') is None\nprint(deformkit_build.find_torch())"
    )
    done = backend(STUB + program, "-S", PYTHONPATH="", PYTHONNOUSERSITE="1")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(torch.__file__).parent
    requirements = (
        "print(deformkit_build.get_requires_for_build_wheel(), deformkit_build.get_requires_for_build_editable())"
    )
    done = backend(STUB + requirements, "-S", PYTHONPATH="")
    assert done.stdout.strip() == "['cmake'] ['cmake']", done.stderr


def test_torch_is_required_if_it_is_missing() -> None:
    program = "deformkit_build.find_torch = lambda: None\nprint(deformkit_build.get_requires_for_build_wheel())"
    done = backend(STUB + program)
    assert done.stdout.strip() == "['cmake', 'torch>=2.10']", done.stderr
    program += "\nprint(deformkit_build.get_requires_for_build_wheel({'cmake.define.DEFORMKIT_TORCH': 'x'}))"
    assert backend(STUB + program).stdout.splitlines()[1] == "['cmake']"


def test_a_torch_without_headers_or_too_old_is_not_used(tmp_path: Path) -> None:
    header = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    answers = []
    for minor in (9, 10):
        header.write_text(f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n")
        answers.append(f"from pathlib import Path; print(deformkit_build._will_do(Path({str(tmp_path)!r})))")
        answers[-1] = backend(STUB + answers[-1]).stdout.strip()
    header.unlink()
    program = f"from pathlib import Path; print(deformkit_build._will_do(Path({str(tmp_path)!r})))"
    assert [*answers, backend(STUB + program).stdout.strip()] == ["False", "True", "False"]


def test_an_editable_install_compiles_for_this_processor_and_a_wheel_for_all() -> None:
    build = "build = lambda folder, settings, metadata: print(settings['cmake.define.DEFORMKIT_ISAS'])\n"
    asked = "{'build-dir': 'none', 'cmake.define.DEFORMKIT_ISAS': 'avx2'}"
    program = STUB + build + "core.build.build_wheel = core.build.build_editable = build\n"
    for kind in ("wheel", "editable"):
        program += (
            f"deformkit_build.build_{kind}('', {{'build-dir': 'none'}})\ndeformkit_build.build_{kind}('', {asked})\n"
        )
    said = [line for line in backend(program).stdout.splitlines() if not line.startswith("deformkit: ")]
    assert said == ["all", "avx2", "native", "avx2"]


def test_each_environment_builds_in_a_folder_of_its_own() -> None:
    program = "print(deformkit_build._build_directory({torch!r}))"
    one, same, other = (backend(STUB + program.format(torch=name)).stdout for name in ("a", "a", "b"))
    compiler = backend(STUB + program.format(torch="a"), CXX="another").stdout
    assert one == same
    assert len({one, other, compiler}) == 3
    assert all(name.startswith("build/") for name in (one, other, compiler))
