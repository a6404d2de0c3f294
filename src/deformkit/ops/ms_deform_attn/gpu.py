"""The points of multi-scale deformable attention in Triton; see ``sample/gpu_heads.py`` for the kernels."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._shape import name_of
from ..sample.gpu import Rule
from ..sample.gpu_heads import Heads
from ..sample.gpu_launch import largest_index


@triton.jit
def level_point(location, point, query, size, out_size, scale, RULE: tl.constexpr, SETTINGS: tl.constexpr):
    """A location in pixels, half a pixel farther in nearest mode, in which the lower corner is the nearest pixel."""
    half: tl.constexpr = 0.5 if RULE.nearest else -0.5
    z, y, x = location
    return (0, 0, 0), (z * size[0] + half, y * size[1] + half, x * size[2] + half), size


def extent(value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, *_: object) -> int:
    """The largest number that kernels have to store in 32 bits."""
    axes, queries = sampling_locations.shape[-1], sampling_locations.shape[1:2]
    levels = (spatial_shapes[i : i + axes] for i in range(0, len(spatial_shapes), axes))
    return max(value.shape[1], *(largest_index(level, queries) for level in levels))


def forward(*args: Any) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    return _heads(*args).forward().flatten(2)


def backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    *args, output_mask = args
    heads = _heads(*args)
    return heads.backward(grad_output.unflatten(2, (heads.heads, heads.channels)), output_mask)


def _heads(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    mode: int,
) -> Heads:
    axes, nearest = sampling_locations.shape[-1], name_of("mode", mode) == "nearest"
    return Heads(
        value,
        sampling_locations,
        attention_weights,
        sizes=[spatial_shapes[i : i + axes] for i in range(0, len(spatial_shapes), axes)],
        num_points=num_points,
        placed=level_point,
        settings=None,
        scale=None,
        rule=Rule(axes, border=nearest, nearest=nearest),
        x_first=True,
    )
