"""Calling import shims as old programs call the extensions that these stand in for."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deformkit import compat
from deformkit._testing import assert_close, evaluate


def found(name: str) -> ModuleType:
    """The module that deformkit installs under a name."""
    assert compat.install(name) == (name,)
    return importlib.import_module(name)


def as_function(forward: Callable[..., Tensor], backward: Callable[..., Any]) -> Any:
    """Old programs use such a module like this: its two functions in an autograd.Function, called with tensors only."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return forward(*tensors)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            return tuple(backward(grad, *ctx.saved_tensors))

    return Function.apply


def compare(ours: Any, theirs: Any, tensors: list[Tensor]) -> None:
    """Compare the value and every gradient."""
    results = [evaluate(function, tensors, range(len(tensors)), torch.float64) for function in (ours, theirs)]
    for number, pair in enumerate(zip(*results, strict=True)):
        assert pair[1].any()
        assert_close(*pair, name=f"gradient {number}" if number else "output")
