"""Loads the CPU kernels: of the libraries in ``deformkit/lib``, the best one that this processor runs.

Without a library the reference answers every call, and one warning says so and names the cure; so does one if a library
is there and does not load. What was loaded, and why each other library was not, stays in :data:`selection` for
``deformkit doctor``.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import __path__ as _roots

# Best first. What a processor of some capability runs is its own instruction set and all that follow it.
ISAS = ("avx512", "avx2", "baseline")

_CURE = (
    "To compile the kernels for this system, run `pip install --force-reinstall --no-deps .` in a copy of the source, "
    "with a C++ compiler (g++ >= 12 or clang++ >= 15); `deformkit doctor` then says which kernels answer."
)


@dataclass
class Selection:
    """What was loaded, and why nothing else was."""

    capability: str
    isa: str | None = None
    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def load(roots: Iterable[str | Path], capability: str) -> Selection:
    """Load the best library found in ``lib`` under one of ``roots``.

    Args:
        roots: the directories of the package; an editable install has two, one of them with the libraries.
        capability: as :func:`torch.backends.cpu.get_cpu_capability` names it; anything unknown runs the baseline.
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
            selection.reasons[isa] = f"torch reports {capability} as what this processor runs"
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
        message = f"deformkit uses {instead} because a library of kernels does not load. {'; '.join(failures)}. {_CURE}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    elif selection.isa is None:
        searched = " or ".join(map(str, directories))
        message = (
            f"deformkit uses the slow reference because no library of kernels for this processor is in {searched}."
        )
        warnings.warn(f"{message} {_CURE}", RuntimeWarning, stacklevel=2)
    return selection


selection = load(_roots, torch.backends.cpu.get_cpu_capability())
