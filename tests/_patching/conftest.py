"""Fixtures of the tests of patch: models of the benchmarks, and a check that nothing stays replaced."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from patched import LAYERS, attention
from torch import nn

import deformkit as dk

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo.py"


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Such small layers spend most of their time waiting for threads, which is long on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_stays_replaced() -> Iterator[None]:
    yield
    from deformkit._patching.swap import _shared

    names = list(_shared)
    for shared in _shared.values():
        setattr(shared.namespace, shared.name, shared.original)
    _shared.clear()
    assert not names, f"still replaced: {names}"


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    layer, arguments = attention(request.param)
    yield layer, arguments
    dk.unpatch(layer)
