"""Deformable convolution: the public functions, their checks, and the registration."""

from collections.abc import Sequence

from torch import Tensor

from .. import _script
from .._library import define
from .._public import public
from .._shape import (
    Boundary,
    check_alike,
    check_floating,
    check_offset_channels,
    check_offset_dtype,
    check_output_size,
    checked_output_size,
    code_of,
    name_of,
    ntuple,
)
from . import reference


@public(_script.deform_conv1d)
def deform_conv1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Deformable convolution of a sequence; :func:`deform_conv2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, ``offset [B, og*K, Lout]``, ``mask [B, og*K, Lout]``, ``weight [Cout, C/groups, K]``.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 50), torch.randn(16, 8, 3)
        >>> deform_conv1d(input, torch.zeros(2, 3, 50), weight, padding=1).shape
        torch.Size([2, 16, 50])
    """
    return _deform_conv(1, input, offset, weight, bias, stride, padding, dilation, mask, boundary)


@public(_script.deform_conv2d)
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Deformable convolution of an image: an offset of its own moves every tap at every output position.

    ``output[b, f, o] = bias[f] + sum over c, k of
    weight[f, c, k] * mask[b, k, o] * sample(input[b, c], stride*o - padding + dilation*k + offset[b, k, o])``

    where ``sample`` is bilinear interpolation. Without ``mask`` this is version 1 (DCN), with it version 2 (DCNv2). The
    number of groups is ``C / weight.shape[1]``. The number of offset groups, og, is ``offset.shape[1] / (K * 2)``; the
    channels of an offset group share their offsets and masks.

    Args:
        input: ``[B, C, H, W]``; float16, bfloat16, float32 or float64.
        offset: ``[B, og*K*2, Hout, Wout]`` in pixels. For each offset group the taps in row-major order, for each tap
            the shift along h, then along w. Any floating dtype, but float64 if and only if ``input`` is float64;
            coordinates are computed in float32, or float64 for a float64 input.
        weight: ``[Cout, C/groups, kh, kw]`` in the dtype of ``input``; K = kh*kw.
        bias: ``[Cout]`` in the dtype of ``input``, or None.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels.
        dilation: distance between two taps, in pixels.
        mask: ``[B, og*K, Hout, Wout]`` in the dtype of ``input``, the factors of the taps; or None.
        boundary: ``"zeros"``: pixels outside the input are 0. ``"border"``: points are clamped into the input.
            ``"reflect"``: points are mirrored at the outer edges of the end pixels, at -0.5 and size - 0.5.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``input``, where
        ``Hout = (H + 2*padding - dilation*(kh-1) - 1) // stride + 1``.
        A NaN offset gives NaN in the outputs that depend on it and in its gradients. A point at infinity is outside.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 8, 3, 3)
        >>> offset = torch.zeros(2, 18, 20, 30)
        >>> output = deform_conv2d(input, offset, weight, padding=1)
        >>> torch.allclose(output, torch.nn.functional.conv2d(input, weight, padding=1), atol=1e-4)
        True

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """
    return _deform_conv(2, input, offset, weight, bias, stride, padding, dilation, mask, boundary)


@public(_script.deform_conv3d)
def deform_conv3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Deformable convolution of a volume or a video; :func:`deform_conv2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, ``offset [B, og*K*3, Dout, Hout, Wout]`` (for each tap the shifts along d, h, w),
    ``mask [B, og*K, Dout, Hout, Wout]``, ``weight [Cout, C/groups, kd, kh, kw]``.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(1, 4, 6, 7, 8), torch.randn(5, 4, 3, 3, 3)
        >>> deform_conv3d(input, torch.zeros(1, 81, 6, 7, 8), weight, padding=1).shape
        torch.Size([1, 5, 6, 7, 8])
    """
    return _deform_conv(3, input, offset, weight, bias, stride, padding, dilation, mask, boundary)


def _deform_conv(
    axes: int,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Tensor | None,
    boundary: str,
) -> Tensor:
    strides = ntuple(stride, axes, "stride", 1)
    paddings = ntuple(padding, axes, "padding", 0)
    dilations = ntuple(dilation, axes, "dilation", 1)
    args = (input, offset, weight, bias, strides, paddings, dilations, mask, code_of("boundary", boundary))
    return _operator.checked_call(*args, axes=axes)


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    boundary: int,
    axes: int | None = None,
) -> list[int]:
    """Check every argument; return the shape of the output."""
    check_floating("input", input)
    axes = min(max(input.dim() - 2, 1), 3) if axes is None else axes
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    for name, value in tensors.items():
        if value is None and name in ("bias", "mask"):
            continue
        check_alike(name, value, "input", input, dtype=name != "offset")
        assert value is not None
        dim = {"bias": 1}.get(name, axes + 2)
        if value.dim() != dim:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; a {axes}-D deformable convolution needs {dim} axes"
            )
    check_offset_dtype(offset, "an input", input.dtype)
    name_of("boundary", boundary)

    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel_size = weight.shape
    if min(weight.shape) < 1:
        raise ValueError(f"weight has shape {list(weight.shape)}; every axis must have at least one element")
    if channels % group_channels or channels == 0:
        raise ValueError(f"input has {channels} channels; weight needs a multiple of its {group_channels} per group")
    if out_channels % (channels // group_channels):
        raise ValueError(
            f"weight has {out_channels} output channels; they must divide into {channels // group_channels} groups"
        )
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(f"bias has {bias.shape[0]} elements; weight has {out_channels} output channels")

    out_size = checked_output_size("input", size, kernel_size, stride, padding, dilation)
    check_offset_channels(offset, mask, kernel_size, "input", channels)
    for name, value in (("offset", offset), ("mask", mask)):
        if value is not None:
            if value.shape[0] != batch:
                raise ValueError(f"{name} has batch size {value.shape[0]}; input has {batch}")
            check_output_size(name, value.shape[2:], out_size, size, kernel_size, stride, padding, dilation)
    return [batch, out_channels, *out_size]


_operator = define(
    "deform_conv(Tensor input, Tensor offset, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, Tensor? mask, int boundary) -> Tensor",
    gpu=f"{__package__}.gpu",
    reference=reference.deform_conv,
    check=_check,
    differentiable=("input", "offset", "weight", "bias", "mask"),
    coordinates=("offset",),
    batched=("input", "offset", "mask"),
    rows={"grad_output": 2, "offset": 2, "mask": 2},
)
