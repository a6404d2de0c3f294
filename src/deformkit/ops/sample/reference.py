"""The sampler in tensor operations: the definition with which every kernel is compared.

A point is kept as ``base + shift``: an integer and a real number. Its cell is ``base + floor(shift)`` and its fraction
``shift - floor(shift)``, so that a small shift keeps its precision however far from the origin it is applied.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor


def sample(field: Tensor, base: Tensor, shift: Tensor, boundary: str, mode: str = "linear") -> Tensor:
    """Multilinear interpolation of ``field`` at the points ``base + shift``.

    ``sample(field, p) = sum over the corners q of the cell around p of field[q] * prod_n (1 - |p_n - q_n|)``

    Args:
        field: ``[G, C, *S]`` with N spatial axes.
        base: integers, broadcastable to ``shift``; in tensor-axis order, in units of grid cells.
        shift: ``[G, *points, N]``, float32 or float64.
        boundary: ``"zeros"``: a corner outside the field counts 0. ``"border"``: the point is clamped into the field.
            ``"reflect"``: a corner outside is the one that it is mirrored to at the outer edges of the end cells, which
            has the value of the point mirrored there.
        mode: ``"linear"``; or ``"nearest"``: the value at ``floor(p + 1/2)``, with no derivative by the point.

    Returns:
        ``[G, C, *points]`` in the dtype of ``shift``. A NaN coordinate gives NaN, and NaN as the gradient of all the
        point's coordinates; it reads nothing of the field. Plus or minus infinity is outside. On a grid line the
        derivative is the one to the right. ``"reflect"`` clamps a shift to plus or minus 2^30, or twice the length of
        the axis if that is more.
    """
    groups, channels, *size = field.shape
    points = shift.shape[1:-1]
    flat = field.flatten(2).to(shift.dtype)

    undefined = shift.isnan().any(-1)
    lower, fraction = [], []
    step: list[Any] = []
    for axis, length in enumerate(size):
        first = base[..., axis]
        distance = shift[..., axis].masked_fill(undefined, 0.0)
        low: Any
        high: Any
        if boundary == "reflect":
            low, high = -float(max(2**30, 2 * length)), float(max(2**30, 2 * length))
        else:
            # Points farther than two cells outside are equivalent; the clamp keeps infinity out of the arithmetic.
            least, most = (0, length - 1) if boundary == "border" else (-2, length)
            low, high = (least - first).to(distance.dtype), (most - first).to(distance.dtype)
        # Where a reflected shift is clamped, both corners are the same.
        follows = (distance >= low) & (distance <= high)
        step.append(follows.to(torch.int64) if boundary == "reflect" else 1)
        distance = torch.where(distance < low, low, torch.where(distance > high, high, distance))
        if mode == "nearest":
            distance = (distance.detach() + 0.5).floor()
        whole = distance.detach().floor()
        lower.append(first + whole.to(torch.int64))
        fraction.append(distance - whole)

    mark = undefined.to(shift.dtype).masked_fill(undefined, torch.nan).unsqueeze(-1)
    result = (shift.masked_fill(~undefined.unsqueeze(-1), 0.0) * mark).sum(-1).unsqueeze(1)
    for corner in product((0,) if mode == "nearest" else (0, 1), repeat=len(size)):
        weight: Any = 1.0
        index: Any = 0
        inside = ~undefined
        for axis, (upper, length) in enumerate(zip(corner, size, strict=True)):
            coordinate = lower[axis] + upper * step[axis]
            if boundary == "border":
                coordinate = coordinate.clamp(0, length - 1)
            if boundary == "reflect":
                coordinate = coordinate.remainder(2 * length)
                coordinate = torch.minimum(coordinate, 2 * length - 1 - coordinate)
            weight = weight * (fraction[axis] if upper else 1 - fraction[axis])
            inside = inside & (coordinate >= 0) & (coordinate < length)
            index = index * length + coordinate.clamp(0, length - 1)
        where = index.flatten(1).unsqueeze(1).expand(-1, channels, -1)
        value = flat.gather(2, where).reshape(groups, channels, *points)
        result = result + value.masked_fill(~inside.unsqueeze(1), 0.0) * weight.unsqueeze(1)
    return result


def tap_grid(
    kernel_size: Sequence[int],
    out_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The points of a plain convolution, ``stride * o - padding + dilation * k``, as integers ``[K, *out, N]``."""
    steps = [torch.arange(n, device=device) * s - p for n, s, p in zip(out_size, stride, padding, strict=True)]
    taps = [torch.arange(k, device=device) * d for k, d in zip(kernel_size, dilation, strict=True)]
    origin, tap = (torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) for axes in (steps, taps))
    return origin + tap.reshape(-1, *[1] * len(out_size), len(out_size))
