"""Splatting: the public function, its checks, and the registration."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from .. import _script
from .._adjoint import RESULT, define_adjoint
from .._public import public
from .._shape import (
    FARTHEST,
    Boundary,
    check_alike,
    check_floating,
    check_location_dtype,
    check_tensor,
    code_of,
    name_of,
    ntuple,
    times,
)
from . import reference


@public(_script.deform_splat)
def deform_splat(input: Tensor, points: Tensor, size: int | Sequence[int], *, boundary: Boundary = "zeros") -> Tensor:
    """Splatting: add every value to the pixels around its point.

    ``output[b, c, q] = sum over i of input[b, c, i] * prod over n of max(0, 1 - |points[b, g, i, n] - q[n]|)``

    where ``g`` is the group of channel ``c``. The number N of spatial axes of the output is 1 to 3. This is the adjoint
    of :func:`deform_sample` by its input: each value is divided among the corners of the cell around its point, with
    the weights that multilinear interpolation has there. Points are in pixels of the output: 0 is the centre of the
    first pixel of an axis. The result is not divided by the weights; splat a tensor of ones to obtain their sum.

    Args:
        input: ``[B, C, *in]``; float16, bfloat16, float32 or float64. ``*in`` has any number of axes, also none.
        points: ``[B, G, *in, N]`` in pixels, the N coordinates in tensor-axis order. The C channels form G groups of
            consecutive channels, and each group has points of its own. float64 if ``input`` is float64, else float32,
            even if ``input`` is in half precision.
        size: size of the output, one int or N ints.
        boundary: ``"zeros"``: what falls outside is lost. ``"border"``: points are clamped into the field.
            ``"reflect"``: points are mirrored at the outer edges of the end pixels, at -0.5 and size - 0.5.

    Returns:
        ``[B, C, *size]`` in the dtype of ``input``, accumulated in float32, or float64 for float64. On a CPU the result
        is bit-identical for any number of threads. A point with a NaN coordinate adds nothing; the gradients by its
        value and coordinates are NaN. A point at infinity is outside.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input = torch.tensor([1.0, 8.0]).reshape(1, 1, 2)
        >>> points = torch.tensor([[0.0, 1.0], [1.5, 2.0]]).reshape(1, 1, 2, 2)
        >>> deform_splat(input, points, (3, 4))
        tensor([[[[0., 1., 0., 0.],
                  [0., 0., 4., 0.],
                  [0., 0., 4., 0.]]]])

    Paper: Softmax Splatting for Video Frame Interpolation, https://arxiv.org/abs/2003.05534, there summation splatting.
    """
    check_floating("input", input)
    check_tensor("points", points)
    in_size, axes = input.shape[2:], points.shape[-1] if points.dim() else 0
    fits = input.dim() >= 2 and points.dim() == input.dim() + 1 and axes in (1, 2, 3)
    if not fits or points.shape[2:-1] != in_size:
        raise ValueError(
            f"points has shape {list(points.shape)}; with input of shape {list(input.shape)} it must be "
            f"[{', '.join(['B', 'G', *map(str, in_size), 'N'])}] with 1, 2 or 3 coordinates N"
        )
    if hasattr(size, "__len__") and len(size) != axes:
        raise ValueError(
            f"size is {size!r}; points has {axes} coordinates, for which it must be one int or {axes} ints"
        )
    return _operator.checked_call(
        input if in_size else input.unsqueeze(2),
        points if in_size else points.unsqueeze(2),
        ntuple(size, axes, "size", 1),
        code_of("boundary", boundary),
    )


def _check(input: Tensor, points: Tensor, size: Sequence[int], boundary: int) -> list[int]:
    """Check every argument in the form that the operator takes; return the shape of the output."""
    check_floating("input", input)
    check_alike("points", points, "input", input, dtype=False)
    check_location_dtype("points", points, "an input", input.dtype)
    name_of("boundary", boundary)
    if input.dim() < 3:
        raise ValueError(f"input has shape {list(input.shape)}; it must be [B, C, *in] with at least one axis in")
    if points.dim() < 4 or points.shape[-1] not in (1, 2, 3):
        raise ValueError(
            f"points has shape {list(points.shape)}; it must be [B, G, *in, N] with 1, 2 or 3 coordinates N"
        )
    axes = points.shape[-1]
    if len(size) != axes or any(s < 1 for s in size):
        raise ValueError(f"size is {list(size)}; it must be {axes} ints of at least 1, one for each coordinate")
    if max(size) > FARTHEST:
        raise ValueError(f"size is {list(size)}; each value must be at most 2^40")
    batch, channels, *in_size = input.shape
    if batch * channels * prod(size) > 2**62:
        raise ValueError(f"size is {times(size)}; the output would have more than 2^62 elements")
    groups = points.shape[1]
    if points.shape[0] != batch:
        raise ValueError(f"points has batch size {points.shape[0]}; input has {batch}")
    if list(points.shape[2:-1]) != in_size:
        raise ValueError(f"points has {times(points.shape[2:-1])} points; input has {times(in_size)} values")
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(
            f"points has {groups} groups and input {channels} channels; the channels must be a multiple of the groups"
        )
    return [batch, channels, *size]


_operator = define_adjoint(
    "deform_splat(Tensor input, Tensor points, SymInt[] size, int boundary) -> Tensor",
    of="deform_sample",
    arguments=(RESULT, "points", "boundary", 0),
    reference=reference.deform_splat,
    check=_check,
    differentiable=("input", "points"),
    coordinates=("points",),
    batched=("input", "points"),
)
