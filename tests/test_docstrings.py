"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import deformkit

MODULES = ["deformkit", *(module.name for module in pkgutil.walk_packages(deformkit.__path__, "deformkit."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
