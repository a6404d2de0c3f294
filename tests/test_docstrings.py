"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import deformkit

MODULES = ["deformkit", *(module.name for module in pkgutil.walk_packages(deformkit.__path__, "deformkit."))]


def importable(name: str) -> bool:
    """Exclude the command line, which runs when imported, and what needs Triton or onnxscript where it is missing."""
    of_triton, of_onnx = ".ops." in name and ".gpu" in name, name.startswith("deformkit.onnx")
    missing = (of_triton and find_spec("triton") is None) or (of_onnx and find_spec("onnxscript") is None)
    return not name.endswith("__main__") and not missing


@pytest.mark.parametrize("name", [name for name in MODULES if importable(name)])
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
