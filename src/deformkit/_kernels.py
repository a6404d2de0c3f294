"""Loads the CPU kernels: of the libraries in ``deformkit/lib``, the best one that this processor supports.

Without a library every call uses the reference implementation. One warning says so and how to compile the kernels;
another is given if a library exists and does not load. :data:`selection` keeps what was loaded, and why each other
library was not, for ``deformkit doctor``.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import __path__ as _roots

# Best first. A processor supports its own instruction set and all that follow it.
ISAS = ("avx512", "avx2", "baseline")

CURE = (
    "To compile the kernels for this system, run `pip install --force-reinstall --no-deps .` in a copy of the source "
    "with a C++ compiler (g++ >= 12 or clang++ >= 15). `deformkit doctor` then shows which kernels are in use."
)


@dataclass
class Selection:
    """The library that was loaded, and why the others were not."""

    capability: str
    isa: str | None = None
    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def load(roots: Iterable[str | Path], capability: str) -> Selection:
    """Load the best library found in ``lib`` under one of ``roots``.

    Args:
        roots: the directories of the package; an editable install has two, one of which holds the libraries.
        capability: as :func:`torch.backends.cpu.get_cpu_capability` names it; an unknown one gets the baseline.
    """
    directories = [Path(root) / "lib" for root in roots]
    best = capability.lower() if capability.lower() in ISAS else "baseline"
    runnable = ISAS[ISAS.index(best) :]
    selection = Selection(capability)
    failures = []
    for isa in ISAS:
        name = f"deformkit_{isa}.so"
        path = next((directory / name for directory in directories if (directory / name).is_file()), None)
        if path is None:
            selection.reasons[isa] = f"no {name} in deformkit/lib: it was not built"
        elif isa not in runnable:
            selection.reasons[isa] = f"torch reports {capability} for this processor"
        elif selection.isa is not None:
            selection.reasons[isa] = f"{selection.isa} is loaded, which is better"
        else:
            try:
                torch.ops.load_library(path)
            except (OSError, RuntimeError) as error:
                selection.reasons[isa] = f"it does not load: {error}"
                failures.append(f"{name}: {error}")
            else:
                selection.isa, selection.path = isa, path
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


selection = load(_roots, torch.backends.cpu.get_cpu_capability())
