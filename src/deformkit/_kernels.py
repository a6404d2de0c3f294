"""Loads ``deformkit/lib/libdeformkit.so``: the schemas of the operators and the CPU kernels.

The library chooses the best kernels for this processor among those beside it. Without it every call uses the reference
implementation. One warning says so and how to compile the kernels; another is given if a library exists and does not
load. :data:`selection` keeps what was loaded, and why each other library was not, for ``deformkit doctor``.
"""

import ctypes
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import __path__ as _roots

LIBRARY = "libdeformkit.so"

# Best first. A processor supports its own instruction set and all that follow it.
ISAS = ("avx512", "avx2", "baseline")

CURE = (
    "To compile the kernels for this system, run `pip install --force-reinstall --no-deps .` in a copy of the source "
    "with a C++ compiler (g++ >= 12 or clang++ >= 15). `deformkit doctor` then shows which kernels are in use."
)


@dataclass
class Selection:
    """The libraries that were loaded, and why the others were not."""

    capability: str
    library: Path | None = None
    isa: str | None = None
    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def load(roots: Iterable[str | Path], capability: str) -> Selection:
    """Load the library found in ``lib`` under one of ``roots``.

    Args:
        roots: the directories of the package; an editable install has two, one of which holds the libraries.
        capability: as :func:`torch.backends.cpu.get_cpu_capability` names it, for the report.
    """
    directories = [Path(root) / "lib" for root in roots]
    selection, failures = Selection(capability), []
    found = next((directory / LIBRARY for directory in directories if (directory / LIBRARY).is_file()), None)
    if found is None:
        selection.reasons = {isa: f"no {LIBRARY} in deformkit/lib: it was not built" for isa in ISAS}
    else:
        found = found.resolve()
        try:
            torch.ops.load_library(found)
            _read(found, selection)
        except (OSError, RuntimeError, AttributeError) as error:
            selection.reasons = {isa: f"{LIBRARY} does not load: {error}" for isa in ISAS}
            failures = [f"{LIBRARY}: {error}"]
        else:
            mark = "it does not load: "
            failures = [
                f"deformkit_{isa}.so: {reason.removeprefix(mark)}"
                for isa, reason in selection.reasons.items()
                if reason.startswith(mark)
            ]
    if failures:
        instead = f"the {selection.isa} library" if selection.isa else "the slow reference"
        message = f"deformkit uses {instead} because a library of kernels does not load. {'; '.join(failures)}. {CURE}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    elif selection.isa is None:
        searched = " or ".join(map(str, directories))
        message = (
            f"deformkit uses the slow reference because no library of kernels for this processor is in {searched}."
        )
        warnings.warn(f"{message} {CURE}", RuntimeWarning, stacklevel=2)
    return selection


def _read(path: Path, selection: Selection) -> None:
    """Fill ``selection`` with what the library at ``path`` says of itself."""
    library = ctypes.CDLL(str(path))
    library.deformkit_isa.restype = library.deformkit_reasons.restype = ctypes.c_char_p
    isa, reasons = (function().decode() for function in (library.deformkit_isa, library.deformkit_reasons))
    selection.library = path
    selection.reasons = dict(line.split(": ", 1) for line in reasons.splitlines())
    if isa:
        selection.isa, selection.path = isa, path.with_name(f"deformkit_{isa}.so")


selection = load(_roots, torch.backends.cpu.get_cpu_capability())


def library_path() -> str:
    """The path of ``libdeformkit.so``, with which a program runs the operators without importing deformkit.

    In Python ``torch.ops.load_library(path)`` makes exported programs, AOTInductor packages and scripted modules run; a
    program in C++ links the library or opens it with ``dlopen``. It runs the operators on a CPU; importing deformkit
    later adds autograd, GPUs and all else.

    Returns:
        An absolute path. The kernels are in the same folder and have to stay there.

    Raises:
        RuntimeError: deformkit was installed without compiled kernels.

    Example:
        >>> library_path().endswith("libdeformkit.so")
        True
    """
    if selection.library is None:
        raise RuntimeError(f"deformkit was installed without {LIBRARY}. {CURE}")
    return str(selection.library)
