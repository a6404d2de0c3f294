"""The points of deformable sampling in Triton; see ``sample/gpu_heads.py`` for the kernels.

Sampling is attention with one level and one point for each query, whose weight is 1: the groups are the heads.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..sample.gpu_heads import Heads
from ..sample.gpu_launch import largest_index, rule


@triton.jit
def given_point(place, point, query, size, out_size, scale, RULE: tl.constexpr, SETTINGS: tl.constexpr):
    """A point as it is given, or the pixel that is nearest to it."""
    z, y, x = place
    if RULE.nearest:
        z, y, x = tl.floor(z + 0.5), tl.floor(y + 0.5), tl.floor(x + 0.5)
    return (0, 0, 0), (z, y, x), (1.0, 1.0, 1.0)


def extent(input: Tensor, points: Tensor, *_: object) -> int:
    """The largest number that kernels have to store in 32 bits."""
    return largest_index(input.shape[2:], points.shape[2:-1])


def forward(input: Tensor, points: Tensor, boundary: int, mode: int) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    samples = _heads(input, points, boundary, mode, read=True).forward()
    return samples.permute(0, 2, 3, 1).flatten(1, 2).contiguous().unflatten(2, points.shape[2:-1])


def backward(
    grad_output: Tensor, input: Tensor, points: Tensor, boundary: int, mode: int, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    by_input, by_points = output_mask
    heads = _heads(input, points, boundary, mode, read=by_points)
    rows = grad_output.flatten(2).unflatten(1, (points.shape[1], -1)).permute(0, 3, 1, 2)
    grad_input, grad_points, _ = heads.backward(rows, [by_input, by_points, False])
    if by_input:
        grad_input = grad_input.permute(0, 2, 3, 1).reshape(input.shape)
    if by_points:
        grad_points = grad_points.squeeze(3).transpose(1, 2).reshape(points.shape)
    return grad_input, grad_points


def _heads(input: Tensor, points: Tensor, boundary: int, mode: int, read: bool) -> Heads:
    """Describe a call; ``read`` says whether kernels read the input, whose channels are then adjacent."""
    axes = points.shape[-1]
    value = input.flatten(2).unflatten(1, (points.shape[1], -1)).permute(0, 3, 1, 2)
    if read and value.stride(-1) != 1:
        value = value.contiguous()
    places = points.flatten(2, -2).transpose(1, 2).unsqueeze(3)
    return Heads(
        value,
        places,
        input.new_ones(()).expand(places.shape[:-1]),
        sizes=[input.shape[2:]],
        num_points=[1],
        placed=given_point,
        settings=None,
        scale=None,
        rule=rule(axes, boundary, mode),
        x_first=False,
    )
