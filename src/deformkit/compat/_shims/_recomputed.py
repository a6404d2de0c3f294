"""Gradients of a function that is computed again, for extensions whose backward gets the arguments of the forward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...ops._shape import check_floating


def recomputed(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The gradients of ``function`` by each of ``tensors`` for that of its output, each in the dtype of its tensor.

    Raises:
        TypeError: ``grad_output`` is not a floating tensor.
        ValueError: ``grad_output`` has another shape than the output.
    """
    check_floating("grad_output", grad_output)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves)
    if grad_output.shape != output.shape:
        raise ValueError(f"grad_output has shape {list(grad_output.shape)}; the output has {list(output.shape)}")
    return list(torch.autograd.grad(output, leaves, grad_output.to(output.dtype)))
