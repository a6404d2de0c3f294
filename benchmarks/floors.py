"""Lower bounds of the time of a call: its bytes, operations and additions, divided by the rates of an H100 (SXM).

They are computed, not measured. The rates are those of the data sheet, except for the last one: the number of float32
additions to memory in a second is an assumption until ``red.py`` has measured it.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from deformkit._testing.cases import operator
from deformkit.ops._shape import conv_output_size

BYTES = 3.35e12
L1_BYTES = 29.7e12
FLOAT32_OPERATIONS = 67e12
MATRIX_OPERATIONS = {"bfloat16": 989e12, "float16": 989e12, "float32": 495e12 / 3}
"""float32 goes through the tensor cores as three products of tf32."""

ADDITIONS = 1.3e12


@dataclass(frozen=True)
class Work:
    """The work that any implementation of a call has to do."""

    bytes: float
    """To and from memory, each input read once, each output written once."""
    matrix: float
    """Operations of matrix products."""
    vector: float
    """Operations of interpolating."""
    gathered: float
    """Bytes of the corners of all points, most of which caches hold."""
    added: float
    """Numbers added into the gradient of a field."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def seconds(self, dtype: str) -> dict[str, float]:
        """The time of each part by itself."""
        return {
            "memory": self.bytes / BYTES,
            "matrix": self.matrix / MATRIX_OPERATIONS[dtype],
            "vector": self.vector / FLOAT32_OPERATIONS,
            "gather": self.gathered / L1_BYTES,
            "scatter": self.added / ADDITIONS,
        }


def floor(work: Work, dtype: str) -> float:
    """The time of the longest part, if all others ran at the same time."""
    return max(work.seconds(dtype).values())


def predicted(work: Work, dtype: str) -> float:
    """The time of all parts one after the other."""
    return sum(work.seconds(dtype).values())


def forward(case: Any, dtype: str) -> Work:
    tensors, samples, channels, products = _sizes(case, dtype)
    corners, size = 2**case.axes, _itemsize(dtype)
    lanes = samples * channels
    return Work(sum(tensors.values()), products, (2 * corners + 2) * lanes, corners * lanes * size, 0)


def backward(case: Any, dtype: str) -> Work:
    """All gradients. Samples are gathered once more, for the weight of a convolution twice."""
    tensors, samples, channels, products = _sizes(case, dtype)
    corners, size = 2**case.axes, _itemsize(dtype)
    lanes = samples * channels
    passes = 2 if products else 1
    moved = 2 * sum(tensors.values()) - tensors["output"]
    return Work(moved, 2 * products, passes * 4 * corners * lanes, passes * corners * lanes * size, corners * lanes)


def both(case: Any, dtype: str) -> Work:
    return forward(case, dtype) + backward(case, dtype)


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _sizes(case: Any, dtype: str) -> tuple[dict[str, float], float, float, float]:
    """The bytes of each tensor, the number of points, the channels at each, and the operations of matrix products."""
    size, kind, axes = _itemsize(dtype), operator(case), case.axes
    if kind in ("deform_conv", "deform_aggregate"):
        steps = ([v] * axes if isinstance(v, int) else list(v) for v in (case.stride, case.padding, case.dilation))
        positions = case.batch * prod(conv_output_size(case.size, case.kernel_size, *steps))
        taps, fields = prod(case.kernel_size), case.batch * prod(case.size)
    if kind == "deform_conv":
        maps = positions * taps * case.offset_groups
        weights = case.out_channels * case.channels // case.groups * taps
        tensors = {
            "input": fields * case.channels * size,
            "offset": maps * axes * size,
            "mask": maps * case.modulated * size,
            "weight": weights * size,
            "output": positions * case.out_channels * size,
        }
        return tensors, positions * taps, case.channels, 2 * positions * weights
    if kind == "deform_aggregate":
        points = positions * (taps - case.remove_center) * case.heads
        tensors = {
            "value": fields * case.heads * case.channels * size,
            "offset": points * axes * size,
            "weight": points * size,
            "output": positions * case.heads * case.channels * size,
        }
        return tensors, points, case.channels, 0
    if kind == "ms_deform_attn":
        queries = case.batch * case.queries * case.heads
        points = queries * sum(case.points)
        tensors = {
            "value": case.batch * sum(map(prod, case.sizes)) * case.heads * case.channels * size,
            "sampling_locations": points * axes * 4,
            "attention_weights": points * size,
            "output": queries * case.channels * size,
        }
        return tensors, points, case.channels, 0
    if kind == "deform_sample":
        points = case.batch * case.groups * prod(case.out_size)
        tensors = {
            "input": case.batch * case.channels * prod(case.size) * size,
            "points": points * axes * 4,
            "output": points * case.channels // case.groups * size,
        }
        return tensors, points, case.channels // case.groups, 0
    bins = case.rois * prod(case.output_size)
    tensors = {
        "input": case.batch * case.channels * prod(case.size) * size,
        "rois": case.rois * (1 + 2 * axes) * 4,
        "offset": bins * axes * size * case.with_offset,
        "output": bins * case.channels * size,
    }
    return tensors, bins * case.sampling_ratio**axes, case.channels, 0
