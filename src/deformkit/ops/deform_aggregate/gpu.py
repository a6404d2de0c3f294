"""The points of deformable aggregation in Triton; see ``sample/gpu_heads.py`` for the kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..sample.gpu import Steps, product, unravel
from ..sample.gpu_heads import Heads
from ..sample.gpu_launch import largest_index, rule, steps


class Settings(NamedTuple):
    """The compile-time constants of the taps."""

    steps: Steps
    remove_center: bool


@triton.jit
def tap_point(offset, tap, position, size, out_size, scale, RULE: tl.constexpr, SETTINGS: tl.constexpr):
    """The point that a tap samples for an output position."""
    KERNEL: tl.constexpr = SETTINGS.steps.kernel
    if SETTINGS.remove_center:
        tap += tl.where(tap < product(KERNEL) // 2, 0, 1)
    az, ay, ax = unravel(position, out_size, RULE)
    oz, oy, ox = offset
    bz, z = tap_along(az, oz, tap // (KERNEL[1] * KERNEL[2]), scale, SETTINGS.steps, 0)
    by, y = tap_along(ay, oy, tap // KERNEL[2] % KERNEL[1], scale, SETTINGS.steps, 1)
    bx, x = tap_along(ax, ox, tap % KERNEL[2], scale, SETTINGS.steps, 2)
    return (bz, by, bx), (z, y, x), (scale, scale, scale)


@triton.jit
def tap_along(position, offset, tap, scale, STEPS: tl.constexpr, AXIS: tl.constexpr):
    """Base and shift along one axis."""
    centre: tl.constexpr = STEPS.dilation[AXIS] * (STEPS.kernel[AXIS] - 1) // 2
    base = position * STEPS.stride[AXIS] + (centre - STEPS.padding[AXIS])
    return base, scale * (tap * STEPS.dilation[AXIS] - centre + offset)


def extent(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *_: object,
) -> int:
    """The largest number that kernels have to store in 32 bits."""
    return largest_index(value.shape[1:-2], offset.shape[1:-3], padding)


def forward(*args: Any) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    return _heads(*args).forward()


def backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Launch the kernel; arguments as in the schema."""
    *args, output_mask = args
    grad_value, *grads = _heads(*args).backward(grad_output.flatten(1, -3), output_mask)
    return grad_value.reshape(args[0].shape) if output_mask[0] else grad_value, *grads


def _heads(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
    boundary: int,
) -> Heads:
    axes = offset.shape[-1]
    return Heads(
        value.flatten(1, axes),
        offset,
        weight,
        sizes=[value.shape[1:-2]],
        num_points=[offset.shape[-2]],
        placed=tap_point,
        settings=Settings(steps(kernel_size, stride, padding, dilation), remove_center),
        scale=offset_scale,
        rule=rule(axes, boundary),
        x_first=False,
    )
