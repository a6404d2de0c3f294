"""The Triton kernels as kernels of the dispatcher, and code that their launchers share.

Triton is imported with the first call on a GPU, not with deformkit. Without it the reference answers there.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .._operator import NAMESPACE, Operator, operators


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def has_kernels(operator: Operator) -> bool:
    """Whether ``operator`` has kernels of its own; an adjoint has those of its partner."""
    return operator.gpu is not None


def launcher(operator: Operator) -> Callable[..., Any]:
    """The implementation of ``operator`` on a GPU: its Triton kernels, or the reference if they do not support a call.

    That is float64, and 2^31 positions in one image, which 32-bit coordinates cannot tell apart.
    """
    backward = operator.name.endswith("_backward")

    def launch(*args: Any) -> Any:
        # Kernels do not check their arguments, and the operator can be called without the public function.
        operator.checked(*args)
        assert operator.gpu is not None
        kernels = importlib.import_module(operator.gpu)
        double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
        if double or kernels.extent(*(args[1:-1] if backward else args)) >= 2**31:
            return operator.fallback(*args)
        return kernels.backward(*args) if backward else kernels.forward(*args)

    return launch


def register() -> None:
    """Register the launcher of every operator that has kernels, for CUDA and ROCm alike."""
    for operator in filter(has_kernels, operators.values()):
        torch.library.register_kernel(f"{NAMESPACE}::{operator.name}", "cuda", launcher(operator))


if available():
    register()
