"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import deformkit

MODULES = ["deformkit", *(module.name for module in pkgutil.walk_packages(deformkit.__path__, "deformkit."))]


def importable(name: str) -> bool:
    """Exclude the command line, which runs when it is imported, and the Triton kernels if there is no Triton."""
    of_triton = ".ops." in name and ".gpu" in name
    return not name.endswith("__main__") and (find_spec("triton") is not None or not of_triton)


@pytest.mark.parametrize("name", [name for name in MODULES if importable(name)])
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
