"""The build backend: scikit-build-core, told which torch to compile against.

pip compiles in an empty environment. The headers are still those of the torch beside which deformkit is installed: the
interpreter that runs this file is the one of that environment, and finds its packages once the variables are gone with
which pip hides them. Where there is no torch, the build requires one; pip has to install one for deformkit in any
case.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 -- pip runs this file before it reads requires-python
    sys.exit("deformkit needs Python 3.10 or newer; %s is Python %d.%d." % (sys.executable, *sys.version_info[:2]))  # noqa: UP031

import hashlib
import importlib.util
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from scikit_build_core import build as _backend
    from scikit_build_core.build import build_sdist as build_sdist
    from scikit_build_core.build import get_requires_for_build_sdist as get_requires_for_build_sdist
    from scikit_build_core.build import prepare_metadata_for_build_editable as prepare_metadata_for_build_editable
    from scikit_build_core.build import prepare_metadata_for_build_wheel as prepare_metadata_for_build_wheel
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "scikit_build_core":
        raise
    sys.exit(
        "deformkit: --no-build-isolation takes the build tools from this environment, which has no scikit-build-core.\n"
        "Leave the option out: `pip install .` brings the tools and compiles against the torch that is installed.\n"
        "Or install them first: pip install scikit-build-core hatch-fancy-pypi-readme cmake ninja"
    )

Settings = Mapping[str, Any]

OLDEST_TORCH = (2, 10)
_WHERE_TORCH_IS = (
    "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
)
# What hides an environment's packages from the process that builds in it.
_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")
_SECONDS_BETWEEN_LINES = 4.0


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    """CMake and ninja where they are missing, and torch where none is installed that will do."""
    return [*_backend.get_requires_for_build_wheel(_plain(config_settings)), *_required_torch(config_settings)]


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    """As for a wheel."""
    return [*_backend.get_requires_for_build_editable(_plain(config_settings)), *_required_torch(config_settings)]


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Compile the kernels and pack the wheel."""
    return _build(_backend.build_wheel, "all", wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Compile the kernels that this processor runs and pack a wheel that refers to the sources, which stay here."""
    return _build(_backend.build_editable, "native", wheel_directory, config_settings, metadata_directory)


def find_torch() -> Path | None:
    """The folder of a torch with headers that will do: of this process, of its environment, or of the active one."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
        if _will_do(folder):
            return folder
    for python in _pythons():
        environment = {name: value for name, value in os.environ.items() if name not in _ISOLATION}
        found = subprocess.run(
            [python, "-c", _WHERE_TORCH_IS], capture_output=True, text=True, env=environment, cwd="/"
        )
        folder = Path(found.stdout.strip() or "missing")
        if found.returncode == 0 and _will_do(folder):
            return folder
    return None


def _pythons() -> Iterator[str]:
    yield sys.executable
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            for python in (
                Path(prefix, "bin", "python"),
                Path(prefix, "Scripts", "python.exe"),
                Path(prefix, "python.exe"),
            ):
                if python.is_file():
                    yield str(python)


def _will_do(torch: Path) -> bool:
    header = torch / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        return False
    text = header.read_text()
    found = [re.search(rf"#define TORCH_VERSION_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    return all(found) and tuple(int(match[1]) for match in found if match) >= OLDEST_TORCH


def _required_torch(config_settings: Settings | None) -> list[str]:
    if "cmake.define.DEFORMKIT_TORCH" in (config_settings or {}) or find_torch():
        return []
    return [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]


def _plain(config_settings: Settings | None) -> dict[str, Any]:
    return dict(config_settings or {})


def _build(
    build: Callable[[str, dict[str, Any], str | None], str],
    isas: str,
    wheel_directory: str,
    config_settings: Settings | None,
    metadata_directory: str | None,
) -> str:
    settings = _plain(config_settings)
    torch = settings.get("cmake.define.DEFORMKIT_TORCH") or find_torch()
    if torch is None:
        sys.exit(
            f"deformkit compiles against the headers of torch >= {'.'.join(map(str, OLDEST_TORCH))}, and "
            f"{sys.executable} has no such torch. Install one first (pip install torch), then deformkit."
        )
    settings["cmake.define.DEFORMKIT_TORCH"] = Path(torch).as_posix()
    settings.setdefault("cmake.define.DEFORMKIT_ISAS", isas)
    folder = settings.setdefault("build-dir", _build_directory(str(torch)))
    with _progress(Path(folder)):
        return build(wheel_directory, settings, metadata_directory)


def _build_directory(torch: str) -> str:
    """One for each environment and compiler: those of two environments may build one clone at the same time."""
    compiler = [os.environ.get(name, "") for name in ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")]
    key = hashlib.sha256("\n".join([sys.prefix, torch, *compiler]).encode()).hexdigest()[:12]
    return f"build/native-{key}"


@contextmanager
def _progress(folder: Path) -> Iterator[None]:
    """Say every few seconds how much is compiled: on standard output, and on the terminal if pip hides that."""
    terminal = None
    if not (sys.stdout.isatty() or "PIP_VERBOSE" in os.environ or "CI" in os.environ):
        try:
            terminal = open("/dev/tty", "w")
        except OSError:
            pass  # no terminal, or Windows

    def say(line: str) -> None:
        print(f"deformkit: {line}", flush=True)
        if terminal:
            print(f"\r  deformkit: {line}", file=terminal, flush=True)

    start, stop = time.time(), threading.Event()

    def watch() -> None:
        while not stop.wait(_SECONDS_BETWEEN_LINES):
            total, done, new = _counted(folder, start)
            if total:
                count = f"{new} of {total} files compiled" if new == done else f"{new} files compiled anew"
                say(f"{count}, {time.time() - start:.0f} s")

    watcher = threading.Thread(target=watch, daemon=True)
    say("compiling the kernels, which takes several minutes on two cores when nothing is compiled yet")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        if terminal:
            terminal.close()


def _counted(folder: Path, start: float) -> tuple[int, int, int]:
    """How many files ninja compiles in ``folder``, how many of them are there, and how many since ``start``."""
    try:
        rules = (folder / "build.ninja").read_text()
    except OSError:
        return 0, 0, 0
    objects = [folder / name for name in re.findall(r"^build (\S+\.o(?:bj)?): CXX", rules, re.MULTILINE)]
    times = [file.stat().st_mtime for file in objects if file.is_file()]
    return len(objects), len(times), sum(time >= start for time in times)
