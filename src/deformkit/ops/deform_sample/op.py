"""Deformable sampling: the public function, its checks, and the registration."""

from torch import Tensor

from .. import _script
from .._library import define
from .._public import public
from .._shape import (
    Boundary,
    Mode,
    axes_of,
    check_alike,
    check_location_dtype,
    check_tensor,
    checked_axes,
    code_of,
    name_of,
)
from . import reference


@public(_script.deform_sample)
def deform_sample(input: Tensor, points: Tensor, *, boundary: Boundary = "zeros", mode: Mode = "linear") -> Tensor:
    """Deformable sampling: the values of a field at given points.

    ``output[b, c, o] = sample(input[b, c], points[b, g, o])``

    where ``sample`` is multilinear interpolation and ``g`` is the group of channel ``c``. The number N of spatial axes
    is 1 to 3. Points are in pixels: 0 is the centre of the first pixel of an axis, and the axes are in the order of
    ``input``, unlike those of :func:`torch.nn.functional.grid_sample`.

    Args:
        input: ``[B, C, *S]`` with N spatial axes; float16, bfloat16, float32 or float64.
        points: ``[B, G, *out, N]`` in pixels, the N coordinates in tensor-axis order. The C channels form G groups of
            consecutive channels, and each group has points of its own. ``*out`` has any number of axes, also none.
            float64 if ``input`` is float64, else float32, even if ``input`` is in half precision. On a CPU, coordinates
            that lie axis by axis, as those of ``displacement.movedim(1, -1)`` do, are read without a copy.
        boundary: ``"zeros"``: pixels outside the field are 0. ``"border"``: points are clamped into the field.
            ``"reflect"``: points are mirrored at the outer edges of the end pixels, at -0.5 and S - 0.5.
        mode: ``"linear"``; or ``"nearest"``: the value of the pixel ``floor(point + 1/2)``, with no gradient to
            ``points``.

    Returns:
        ``[B, C, *out]`` in the dtype of ``input``. A NaN coordinate gives NaN in its outputs and as the gradient of all
        the point's coordinates. A point at infinity is outside. ``"reflect"`` takes a coordinate that is infinite, or
        farther from 0 than 2^30 pixels and 2*S, as that distance, with a gradient of 0.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input = torch.arange(12.0).reshape(1, 1, 3, 4)
        >>> points = torch.tensor([[0.0, 1.0], [1.5, 2.0], [2.0, 3.5]]).reshape(1, 1, 3, 2)
        >>> deform_sample(input, points)
        tensor([[[1.0000, 8.0000, 5.5000]]])

    Papers: Spatial Transformer Networks, https://arxiv.org/abs/1506.02025.
    """
    axes = axes_of("input", input)
    check_tensor("points", points)
    if points.dim() < 3 or points.shape[-1] != axes:
        raise ValueError(
            f"points has shape {list(points.shape)}; with {axes} spatial axes in input it must be [B, G, *out, {axes}]"
        )
    is_single = points.dim() == 3
    samples = _operator.checked_call(
        input,
        points.unsqueeze(2) if is_single else points,
        code_of("boundary", boundary),
        code_of("mode", mode),
    )
    return samples.squeeze(2) if is_single else samples


def _check(input: Tensor, points: Tensor, boundary: int, mode: int) -> list[int]:
    """Check every argument in the form that the operator takes; return the shape of the output."""
    axes = checked_axes("input", input)
    check_alike("points", points, "input", input, dtype=False)
    check_location_dtype("points", points, "an input", input.dtype)
    name_of("boundary", boundary)
    name_of("mode", mode)
    if points.dim() < 4 or points.shape[-1] != axes:
        raise ValueError(
            f"points has shape {list(points.shape)}; with {axes} spatial axes in input it must be [B, G, *out, {axes}] "
            "with at least one axis out"
        )
    batch, channels = input.shape[:2]
    groups = points.shape[1]
    if points.shape[0] != batch:
        raise ValueError(f"points has batch size {points.shape[0]}; input has {batch}")
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(
            f"points has {groups} groups and input {channels} channels; the channels must be a multiple of the groups"
        )
    return [batch, channels, *points.shape[2:-1]]


_operator = define(
    "deform_sample(Tensor input, Tensor points, int boundary, int mode) -> Tensor",
    gpu=f"{__package__}.gpu",
    reference=reference.deform_sample,
    check=_check,
    differentiable=("input", "points"),
    coordinates=("points",),
    batched=("input", "points"),
    rows={"grad_output": 2, "points": 2},
)
