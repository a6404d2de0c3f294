"""Deformable aggregation: the public function, its checks, and the registration."""

from collections.abc import Sequence
from math import inf

from torch import Tensor

from .. import _script
from .._library import define
from .._public import public
from .._shape import (
    Boundary,
    check_alike,
    check_floating,
    check_offset_dtype,
    check_output_size,
    check_tensor,
    checked_output_size,
    code_of,
    name_of,
    ntuple,
    prod,
    times,
)
from . import reference


@public(_script.deform_aggregate)
def deform_aggregate(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Deformable aggregation: a weighted sum over taps that are moved by offsets, as in DCNv3 and DCNv4.

    ``output[b, o, h] = sum over k of weight[b, o, h, k] * sample(value[b, :, h], point[b, o, h, k])``

    ``point = stride*o - padding + centre + offset_scale * (dilation*k - centre + offset[b, o, h, k])``

    where ``sample`` is multilinear interpolation and ``centre = dilation*(kernel_size-1) // 2``. The number N of
    spatial axes, 1 to 3, is the length of the last axis of ``offset``. Channels are not mixed; the D channels of a head
    share its points and weights. DCNv3 normalises its weights by a softmax over the taps; DCNv4 does not.

    Args:
        value: ``[B, *S, H, D]``, the field: N spatial axes, H heads of D channels; float16, bfloat16, float32 or
            float64.
        offset: ``[B, *out, H, K, N]`` in pixels before ``offset_scale``, the taps in row-major order, the coordinates
            in tensor-axis order. Any floating dtype, but float64 if and only if ``value`` is float64; coordinates are
            computed in float32, or float64 for a float64 value.
        weight: ``[B, *out, H, K]`` in the dtype of ``value``.
        kernel_size: number of taps along each axis; K is their product, or one less with ``remove_center``.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the field, in pixels.
        dilation: distance between two taps, in pixels.
        offset_scale: factor that scales the distance of each point from the centre of its window.
        remove_center: whether to leave out the middle tap, the ``K//2``-th; every kernel size must be odd.
        boundary: ``"zeros"``: pixels outside the field are 0. ``"border"``: points are clamped into the field.
            ``"reflect"``: points are mirrored at the outer edges of the end pixels, at -0.5 and size - 0.5.

    Returns:
        ``[B, *out, H, D]`` in the dtype of ``value``, where, as in a convolution,
        ``out = (S + 2*padding - dilation*(kernel_size-1) - 1) // stride + 1``.
        A NaN offset gives NaN in the outputs that depend on it and in its gradients. A point at infinity is outside.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong type or dtype.
        ValueError: a shape, device, size or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> value = torch.randn(2, 20, 30, 4, 8)
        >>> offset, weight = torch.zeros(2, 20, 30, 4, 9, 2), torch.full((2, 20, 30, 4, 9), 1 / 9)
        >>> output = deform_aggregate(value, offset, weight, 3, padding=1)
        >>> mean = torch.nn.functional.avg_pool2d(value.flatten(3).movedim(-1, 1), 3, 1, padding=1)
        >>> torch.allclose(output.flatten(3), mean.movedim(1, -1), atol=1e-6)
        True

    Papers: InternImage (DCNv3), https://arxiv.org/abs/2211.05778; DCNv4, https://arxiv.org/abs/2401.06197.
    """
    axes = _axes(value, offset)
    kernel = ntuple(kernel_size, axes, "kernel_size", 1)
    strides = ntuple(stride, axes, "stride", 1)
    paddings = ntuple(padding, axes, "padding", 0)
    dilations = ntuple(dilation, axes, "dilation", 1)
    steps = (kernel, strides, paddings, dilations)
    # The dispatcher would convert what is not a number, or not a bool.
    check_offset_scale(offset_scale)
    tap_count(kernel, remove_center)
    args = (value, offset, weight, *steps, offset_scale, remove_center, code_of("boundary", boundary))
    return _operator.checked_call(*args)


def _axes(value: Tensor, offset: Tensor) -> int:
    """The number of spatial axes, which is the number of coordinates of an offset."""
    check_tensor("value", value)
    check_tensor("offset", offset)
    if offset.dim() == 0 or offset.shape[-1] not in (1, 2, 3):
        raise ValueError(
            f"offset has shape {list(offset.shape)}; its last axis, of coordinates, must be 1, 2 or 3 long"
        )
    return int(offset.shape[-1])


def _check(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_scale: float,
    remove_center: bool,
    boundary: int,
) -> list[int]:
    """Check every argument; return the shape of the output."""
    axes = _axes(value, offset)
    check_floating("value", value)
    for name, tensor, dim in (("value", value, axes + 3), ("offset", offset, axes + 4), ("weight", weight, axes + 3)):
        check_alike(name, tensor, "value", value, dtype=name != "offset")
        if tensor.dim() != dim:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; with {axes} coordinates in offset it must have {dim} axes"
            )
    check_offset_dtype(offset, "a value", value.dtype)
    name_of("boundary", boundary)
    check_offset_scale(offset_scale)

    batch, *size, heads, channels = value.shape
    if heads < 1 or channels < 1:
        raise ValueError(f"value has {heads} heads of {channels} channels; there must be at least one of each")
    taps = tap_count(kernel_size, remove_center)
    out_size = checked_output_size("value", size, kernel_size, stride, padding, dilation)

    for name, tensor, head_axis in (("offset", offset, -3), ("weight", weight, -2)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}; value has {batch}")
        window = (kernel_size, stride, padding, dilation)
        check_output_size(name, tensor.shape[1:head_axis], out_size, size, *window)
        if tensor.shape[head_axis] != heads:
            raise ValueError(f"{name} has {tensor.shape[head_axis]} heads; value has {heads}")
        if tensor.shape[head_axis + 1] != taps:
            kernel = f"{times(kernel_size)} kernel{' without its centre' if remove_center else ''}"
            raise ValueError(f"{name} has {tensor.shape[head_axis + 1]} taps; a {kernel} has {taps}")
    return [batch, *out_size, heads, channels]


def check_offset_scale(offset_scale: float) -> None:
    """Raise unless ``offset_scale`` is a finite real number."""
    if isinstance(offset_scale, bool) or not isinstance(offset_scale, (int, float)):
        raise TypeError(f"offset_scale is {offset_scale!r}; it must be a real number")
    if not -inf < offset_scale < inf:
        raise ValueError(f"offset_scale is {offset_scale}; it must be finite")


def tap_count(kernel_size: Sequence[int], remove_center: bool) -> int:
    """The number of taps K; a ValueError if there is no centre to remove, or no tap besides it."""
    if not isinstance(remove_center, bool):
        raise TypeError(f"remove_center is {remove_center!r}; it must be True or False")
    if not remove_center:
        return prod(kernel_size)
    if any(k % 2 == 0 for k in kernel_size):
        raise ValueError(f"kernel_size is {times(kernel_size)}; with remove_center every one must be odd")
    if prod(kernel_size) == 1:
        raise ValueError(f"kernel_size is {times(kernel_size)}; with remove_center no tap is left")
    return prod(kernel_size) - 1


_operator = define(
    "deform_aggregate(Tensor value, Tensor offset, Tensor weight, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, float offset_scale, bool remove_center, int boundary) -> Tensor",
    gpu=f"{__package__}.gpu",
    reference=reference.deform_aggregate,
    check=_check,
    differentiable=("value", "offset", "weight"),
    coordinates=("offset",),
    batched=("value", "offset", "weight"),
    rows={"grad_output": 1, "offset": 1, "weight": 1},
)
