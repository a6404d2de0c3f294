"""Small helpers on sizes: tuples per axis, the output size of a convolution, argument checks."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


def ntuple(value: int | Sequence[int], axes: int, name: str, least: int) -> list[int]:
    """Return ``value`` as a list of ``axes`` integers, each at least ``least``."""
    if type(value) is int:
        values = [value] * axes
    else:
        try:
            # The compiler knows the type of an int that it keeps symbolic, but not its __index__.
            values = [v if type(v) is int else int(v.__index__()) for v in value]  # type: ignore[union-attr]
        except (TypeError, AttributeError):
            raise TypeError(f"{name} is {value!r}; it must be an int or a sequence of {axes} ints") from None
        if len(values) == 1:
            values = values * axes
    if len(values) != axes:
        raise ValueError(f"{name} is {value!r}; it needs {axes} values, one for each spatial axis")
    for v in values:
        if v < least:
            raise ValueError(f"{name} is {value!r}; each value must be at least {least}")
    return values


def conv_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial size of a convolution's output, as in :class:`torch.nn.Conv2d`."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def times(size: Sequence[int]) -> str:
    """``[3, 5]`` as ``3x5``, for messages."""
    return "x".join(str(int(s)) for s in size)


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which coordinates and sums are kept: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["check_tensor", "compute_dtype", "conv_output_size", "ntuple", "prod", "times"]
