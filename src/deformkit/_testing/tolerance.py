"""The one rule for every operator, dtype and test of when two results agree.

The truth is computed in float64. A result passes if its error is at most twice the error of the reference in the dtype
of the result, plus a floor: an error that rounding alone can cause, relative to the largest value. This allows for two
implementations that round differently, and not for one that computes something else or in lower precision.
"""

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

FLOOR = {torch.float64: 2e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# If the truth is smaller than this, terms of order one have cancelled, and rounding depends on these terms.
LEAST = 1e-3


@dataclass(frozen=True)
class Comparison:
    """The error of a result, and whether it passes."""

    error: float
    """The largest error of an element that is finite in the truth."""
    scale: float
    """The largest finite value of the truth, but at least :data:`LEAST`."""
    problem: str | None
    """Why the result does not pass; None if it does."""


def compare(actual: Tensor, truth: Tensor, reference: Tensor | None = None, name: str = "result") -> Comparison:
    """Compare ``actual`` with the truth in float64, and its error with that of ``reference`` in the same dtype.

    NaN and infinities must be in the same places as in ``truth``. Without a reference, the floor alone is allowed.
    """
    finite = truth[truth.isfinite()]
    scale = max(finite.abs().max().item() if finite.numel() else 0.0, LEAST)
    problem = _misfit(actual, truth, name)
    if problem is None and reference is not None and actual.dtype != reference.dtype:
        problem = f"{name} has dtype {actual.dtype} instead of {reference.dtype}"
    if problem is None and reference is not None:
        problem = _misfit(reference, truth, f"reference of {name}")
    if problem is not None:
        return Comparison(nan, scale, problem)
    error = _error(actual, truth)
    allowed = 2 * _error(reference, truth) if reference is not None else 0.0
    floor = FLOOR[actual.dtype] * scale
    if not error <= allowed + floor:
        problem = (
            f"{name} is off by {error:.3g}; allowed are {allowed:.3g} (twice the error of the reference in "
            f"{actual.dtype}) + {floor:.3g} (the floor at values up to {scale:.3g})"
        )
    return Comparison(error, scale, problem)


def half_of_digits(dtype: torch.dtype) -> float:
    """The relative error up to which a result is right where the reference has not been run in its dtype."""
    return torch.finfo(dtype).eps ** 0.5 if dtype.is_floating_point else 0.0


def assert_close(actual: Tensor, truth: Tensor, reference: Tensor | None = None, name: str = "result") -> None:
    """Fail unless ``actual`` passes :func:`compare`."""
    problem = compare(actual, truth, reference, name).problem
    assert problem is None, problem


def assert_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Fail unless the two have the same bits, NaN included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name} differs in dtype or shape"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name} differs in {int((~same).sum())} of {same.numel()} elements"


def _misfit(actual: Tensor, truth: Tensor, name: str) -> str | None:
    """Why the numbers cannot be compared; None if they can."""
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    if actual.shape != truth.shape:
        return f"{name} has shape {list(actual.shape)} instead of {list(truth.shape)}"
    if actual.device != truth.device:
        return f"{name} is on {actual.device} instead of {truth.device}"
    for what in ("isnan", "isposinf", "isneginf"):
        here, there = getattr(actual.detach().double(), what)(), getattr(truth, what)()
        if not torch.equal(here, there):
            return f"{name} has {int(here.sum())} elements that are {what[2:]}, not {int(there.sum())}"
    return None


def _error(actual: Tensor, truth: Tensor) -> float:
    finite = truth.isfinite()
    return (actual.detach().double() - truth)[finite].abs().max().item() if finite.any() else 0.0
