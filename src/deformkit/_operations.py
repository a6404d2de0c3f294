"""How many operations an operator takes, also for :class:`torch.utils.flop_counter.FlopCounterMode`."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from .ops._operator import operators


@cache  # torch refuses a formula for the second time, and deformkit may be loaded again.
def register() -> None:
    """Make ``FlopCounterMode`` count the operators, their matrix products and their interpolation."""
    for name, operator in operators.items():
        register_flop_formula(operator.overload.overloadpacket, get_raw=True)(partial(_count, name))


def _count(name: str, *args: Any, out_val: Any) -> int:
    return sum(operations(name, args))


def operations(name: str, args: Sequence[Any]) -> tuple[int, int]:
    """Operations of an operator of this package: in its matrix product, and in interpolation.

    A sample is a sum over the 2^N corners of its cell, so a sample of C channels takes ``2 * 2^N * C`` operations. The
    backward computes the samples again, adds their gradients to the corners, and takes the derivative by the points:
    three times as many. The gradients of a matrix product are two such products. All gradients count as asked for.
    """
    forward = name.removesuffix("_backward")
    is_backward = forward != name
    named = dict(zip(operators[forward].arguments, args[is_backward:], strict=False))
    samples, axes, matrix = _SAMPLES[forward](named)
    vector = 2 * 2**axes * samples
    return (2 * matrix, 3 * vector) if is_backward else (matrix, vector)


def _of_conv(of: dict[str, Any]) -> tuple[int, int, int]:
    (batch, channels), (out_channels, per_group, *kernel) = of["input"].shape[:2], of["weight"].shape
    positions = batch * prod(of["offset"].shape[2:])
    taps = prod(kernel)
    return positions * taps * channels, len(kernel), 2 * positions * taps * out_channels * per_group


def _of_conv_transpose(of: dict[str, Any]) -> tuple[int, int, int]:
    (channels, per_group, *kernel), groups = of["weight"].shape, of["groups"]
    positions = of["input"].shape[0] * prod(of["input"].shape[2:])
    taps = prod(kernel)
    return positions * taps * per_group * groups, len(kernel), 2 * positions * taps * channels * per_group


def _of_aggregate(of: dict[str, Any]) -> tuple[int, int, int]:
    offset = of["offset"]
    samples = prod(offset.shape[:-1]) * of["value"].shape[-1]
    return samples, offset.shape[-1], 2 * samples


def _of_attention(of: dict[str, Any]) -> tuple[int, int, int]:
    value, locations = of.get("value", of.get("key")), of["sampling_locations"]
    assert value is not None
    samples = prod(locations.shape[:-1]) * value.shape[-1]
    if locations.shape[2] == 1:
        samples *= value.shape[2]
    return samples, locations.shape[-1], 2 * samples


def _of_sample(of: dict[str, Any]) -> tuple[int, int, int]:
    points = of["points"]
    return prod(points.shape[2:-1]) * of["input"].shape[0] * of["input"].shape[1], points.shape[-1], 0


def _of_roi_pool(of: dict[str, Any]) -> tuple[int, int, int]:
    rois, ratio = of["rois"], max(of.get("sampling_ratio") or 2, 1)
    axes = (rois.shape[1] - 1) // 2
    bins = rois.shape[0] * prod(of["output_size"])
    return bins * ratio**axes * of["input"].shape[1], axes, 0


_SAMPLES: dict[str, Callable[[dict[str, Any]], tuple[int, int, int]]] = {
    "deform_conv": _of_conv,
    "deform_conv_transpose": _of_conv_transpose,
    "deform_aggregate": _of_aggregate,
    "ms_deform_attn": _of_attention,
    "deform_correlate": _of_attention,
    "deform_sample": _of_sample,
    "deform_splat": _of_sample,
    "deform_roi_pool": _of_roi_pool,
}
"""For each operator: sampled values, axes, and the operations of the product or sum that follows."""
