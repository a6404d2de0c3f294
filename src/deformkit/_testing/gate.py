"""Whether an implementation computes what the reference does, before it is timed."""

from typing import Any

import torch
from torch import Tensor

from .rivals import Call, ours, reference


def cotangent(case: Any, arguments: dict[str, Any]) -> Tensor:
    """Random weights of the output, rounded so that every dtype holds them."""
    with torch.no_grad():
        shape = ours(case, arguments).run().shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def truth(case: Any, arguments: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The output and the gradients of the reference at the same values in ``dtype``, by name."""
    exact = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return reference(case, exact).evaluate(cotangent(case, arguments))


def error(call: Call, expected: dict[str, Tensor], weights: Tensor) -> float:
    """The worst error of the output and the gradients, relative to the largest value of each."""
    found = call.evaluate(weights)
    scales = {name: e.abs().max().clamp(min=torch.finfo(e.dtype).tiny) for name, e in expected.items()}
    return max(((found[name].to(e.dtype) - e).abs().max() / scales[name]).item() for name, e in expected.items())
