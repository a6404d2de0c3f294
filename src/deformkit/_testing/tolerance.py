"""When two results agree: the one rule for every operator, dtype and test.

The truth is computed in float64. A result passes if its error is at most twice that of the reference run in the
result's dtype, plus a floor: what rounding alone may cost, relative to the largest value. Two implementations that
both round can differ by luck; one that computes something else, or in less precision, cannot hide under that.
"""

import torch
from torch import Tensor

FLOOR = {torch.float64: 2e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Where the truth is smaller than this, terms of order one have cancelled, and rounding goes by the terms.
LEAST = 1e-3


def assert_close(actual: Tensor, truth: Tensor, reference: Tensor | None = None, name: str = "result") -> None:
    """Fail unless ``actual`` is as near to ``truth`` as ``reference``, of the same dtype, lets one expect.

    NaN and infinities have to be where they are in ``truth``. Without a reference there is the floor alone.
    """
    assert actual.shape == truth.shape, f"{name} has shape {list(actual.shape)} instead of {list(truth.shape)}"
    assert actual.device == truth.device, f"{name} is on {actual.device} instead of {truth.device}"
    error = _error(actual, truth, name)
    if reference is not None:
        assert actual.dtype == reference.dtype, f"{name} has dtype {actual.dtype} instead of {reference.dtype}"
    allowed = 2 * _error(reference, truth, f"reference of {name}") if reference is not None else 0.0
    finite = truth[truth.isfinite()]
    scale = max(finite.abs().max().item() if finite.numel() else 0.0, LEAST)
    floor = FLOOR[actual.dtype] * scale
    assert error <= allowed + floor, (
        f"{name} is off by {error:.3g}; allowed are {allowed:.3g} (twice the error of the reference in {actual.dtype}) "
        f"+ {floor:.3g} (the floor at values up to {scale:.3g})"
    )


def assert_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Fail unless the two have the same bits, NaN included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name} differs in dtype or shape"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name} differs in {int((~same).sum())} of {same.numel()} elements"


def _error(actual: Tensor, truth: Tensor, name: str) -> float:
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    actual = actual.detach().double()
    for what in ("isnan", "isposinf", "isneginf"):
        here, there = getattr(actual, what)(), getattr(truth, what)()
        assert torch.equal(here, there), (
            f"{name} has {int(here.sum())} elements that are {what[2:]}, not {int(there.sum())}"
        )
    finite = truth.isfinite()
    return (actual - truth)[finite].abs().max().item() if finite.any() else 0.0
