"""Helpers of the tests of compat: programs of other Pythons, and properties of every layer."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deformkit._testing import assert_close, assert_equal


def run_elsewhere(variable: str, program: str, calls: Any, folder: Path) -> Any:
    """The results of ``program`` for ``calls``, computed by the Python that an environment variable names.

    The program gets two files: one with the calls, and one for the results.
    """
    torch.save(calls, folder / "calls.pt")
    (folder / "run.py").write_text(program)
    subprocess.run(
        [os.environ[variable], folder / "run.py", folder / "calls.pt", folder / "results.pt"],
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        stderr=sys.stderr,
    )
    return torch.load(folder / "results.pt")


def assert_copied_compiled_and_halved(layer: nn.Module, arguments: list[Any]) -> None:
    """Copies and compiled code give the same results and gradients; autocast and half precision give finite results."""
    expected = layer(*arguments)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other(*arguments), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), expected.detach().double(), expected)
    compiled(*arguments).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(*arguments)
        assert result.dtype == torch.bfloat16 and result.isfinite().all()
    for dtype in (torch.bfloat16, torch.float16):
        halves = [value.to(dtype) if isinstance(value, Tensor) else value for value in arguments]
        result = layer.to(dtype)(*halves)
        assert result.dtype == dtype and result.isfinite().all()
