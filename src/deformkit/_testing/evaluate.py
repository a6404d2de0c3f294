"""Values and gradients of a function, the same way for every implementation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def evaluate(
    function: Callable[..., Tensor], args: Sequence[Any], positions: Sequence[int], cotangent_dtype: torch.dtype
) -> list[Tensor]:
    """The value of ``function`` at ``args``, then the gradients at ``positions`` for a random cotangent.

    The cotangent is rounded to ``cotangent_dtype``, so that one in float64 can be the same as one in half precision.
    """
    values = [v.detach() if isinstance(v, Tensor) else v for v in args]
    for i in positions:
        values[i] = values[i].requires_grad_()
    output = function(*values)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(output, [values[i] for i in positions], cotangent.to(cotangent_dtype).to(output))
    return [output.detach(), *grads]
