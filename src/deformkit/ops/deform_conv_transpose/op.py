"""Transposed deformable convolution: the public functions, their checks, and the registration."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .. import _script
from .._adjoint import RESULT, define_adjoint
from .._public import public
from .._shape import (
    FARTHEST,
    Boundary,
    check_alike,
    check_count,
    check_floating,
    check_offset_channels,
    check_offset_dtype,
    check_window,
    code_of,
    name_of,
    ntuple,
    times,
    transposed_output_size,
)
from . import reference


@public(_script.deform_conv_transpose1d)
def deform_conv_transpose1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Transposed deformable convolution of a sequence; :func:`deform_conv_transpose2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, ``offset [B, og*K, L]``, ``mask [B, og*K, L]``, ``weight [C, Cout/groups, K]``.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 50), torch.randn(8, 16, 4)
        >>> deform_conv_transpose1d(input, torch.zeros(2, 4, 50), weight, stride=2, padding=1).shape
        torch.Size([2, 16, 100])
    """
    args = (stride, padding, output_padding, groups, dilation, mask, boundary)
    return _deform_conv_transpose(1, input, offset, weight, bias, *args)


@public(_script.deform_conv_transpose2d)
def deform_conv_transpose2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Transposed deformable convolution of an image: every tap adds to the output at a point of its own.

    ``output[b, f, q] = bias[f] + sum over c, k, i of
    weight[c, f, k] * mask[b, k, i] * input[b, c, i] * hat(q - p[b, k, i])``,
    ``p[b, k, i] = stride*i - padding + dilation*k + offset[b, k, i]``

    where ``hat(d)`` is the product of ``max(0, 1 - |d_n|)`` over the axes: what is added at a point is divided between
    the pixels around it by the weights of bilinear interpolation. This is the adjoint of :func:`deform_conv2d` with the
    same offset, weight and mask: the scalar product of ``deform_conv2d(x)`` with ``input`` is that of x with the
    output, without bias. With zero offsets and no mask it is :func:`torch.nn.functional.conv_transpose2d`, whose
    arguments it has in the same order. The number of offset groups, og, is ``offset.shape[1] / (K * 2)``; the output
    channels of an offset group share their offsets and masks.

    Args:
        input: ``[B, C, H, W]``; float16, bfloat16, float32 or float64.
        offset: ``[B, og*K*2, H, W]`` in pixels of the output. For each offset group the taps in row-major order, for
            each tap the shift along h, then along w. Any floating dtype, but float64 if and only if ``input`` is
            float64; coordinates are computed in float32, or float64 for a float64 input.
        weight: ``[C, Cout/groups, kh, kw]`` in the dtype of ``input``; K = kh*kw.
        bias: ``[Cout]`` in the dtype of ``input``, or None.
        stride: distance in the output between two positions of the input, in pixels.
        padding: how many rows and columns the output loses at each edge, in pixels.
        output_padding: how many rows and columns the output gains at the end of each axis, in pixels; less than the
            stride or the dilation.
        groups: number of groups of channels that are convolved separately.
        dilation: distance between two taps, in pixels.
        mask: ``[B, og*K, H, W]`` in the dtype of ``input``, the factors of the taps; or None.
        boundary: ``"zeros"``: what falls outside the output is lost. ``"border"``: points are clamped into the output.
            ``"reflect"``: points are mirrored at the outer edges of the end pixels, at -0.5 and size - 0.5.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``input``, where
        ``Hout = (H-1)*stride - 2*padding + dilation*(kh-1) + output_padding + 1``.
        A tap with a NaN offset adds nothing to the output, and the gradients that depend on it are NaN. A point at
        infinity is outside.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(8, 16, 4, 4)
        >>> offset = torch.zeros(2, 32, 20, 30)
        >>> output = deform_conv_transpose2d(input, offset, weight, stride=2, padding=1)
        >>> plain = torch.nn.functional.conv_transpose2d(input, weight, stride=2, padding=1)
        >>> torch.allclose(output, plain, atol=1e-4)
        True

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """
    args = (stride, padding, output_padding, groups, dilation, mask, boundary)
    return _deform_conv_transpose(2, input, offset, weight, bias, *args)


@public(_script.deform_conv_transpose3d)
def deform_conv_transpose3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
) -> Tensor:
    """Transposed deformable convolution of a volume or a video; :func:`deform_conv_transpose2d` with three axes.

    Shapes: ``input [B, C, D, H, W]``, ``offset [B, og*K*3, D, H, W]`` (for each tap the shifts along d, h, w),
    ``mask [B, og*K, D, H, W]``, ``weight [C, Cout/groups, kd, kh, kw]``.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(1, 4, 3, 4, 5), torch.randn(4, 5, 2, 2, 2)
        >>> deform_conv_transpose3d(input, torch.zeros(1, 24, 3, 4, 5), weight, stride=2).shape
        torch.Size([1, 5, 6, 8, 10])
    """
    args = (stride, padding, output_padding, groups, dilation, mask, boundary)
    return _deform_conv_transpose(3, input, offset, weight, bias, *args)


def _deform_conv_transpose(
    axes: int,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    mask: Tensor | None,
    boundary: str,
) -> Tensor:
    strides = ntuple(stride, axes, "stride", 1)
    paddings = ntuple(padding, axes, "padding", 0)
    dilations = ntuple(dilation, axes, "dilation", 1)
    extras = ntuple(output_padding, axes, "output_padding", 0)
    for extra, step, distance in zip(extras, strides, dilations, strict=True):
        if extra >= max(step, distance):
            raise ValueError(
                f"output_padding is {output_padding!r}; each value must be less than the stride, {stride!r}, or the "
                f"dilation, {dilation!r}"
            )
    check_count("groups", groups)
    rest = (paddings, extras, groups, dilations, mask, code_of("boundary", boundary))
    steps = [extra // step for extra, step in zip(extras, strides, strict=True)]
    if any(steps) or not _is_bias(bias, input, weight, groups):
        _check(input, offset, weight, strides, *rest, axes=axes, whole_steps=True)
        _check_bias(bias, input, groups * weight.shape[1])
    if any(steps):
        # Output padding of whole steps is room for further positions of the input, which are 0.
        widths = [width for more in reversed(steps) for width in (0, more)]
        input, offset = F.pad(input, widths), F.pad(offset, widths)
        mask = None if mask is None else F.pad(mask, widths)
        extras = [extra % step for extra, step in zip(extras, strides, strict=True)]
        rest = (paddings, extras, groups, dilations, mask, code_of("boundary", boundary))
    output = _operator.checked_call(input, offset, weight, strides, *rest, axes=axes)
    return output if bias is None else output + bias.to(output.dtype).reshape(-1, *[1] * axes)


def _is_bias(bias: Tensor | None, input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether ``bias`` is None, or the checks are sure to pass it if they pass all the others."""
    if bias is None:
        return True
    if not all(isinstance(value, Tensor) for value in (bias, input, weight)) or weight.dim() < 2:
        return False
    alike = bias.device == input.device and bias.dtype == input.dtype
    return alike and bias.dim() == 1 and bias.shape[0] == groups * weight.shape[1]


def _check_bias(bias: Tensor | None, input: Tensor, channels: int) -> None:
    """Raise unless ``bias`` is None or fits an output of so many channels."""
    if bias is None:
        return
    check_alike("bias", bias, "input", input)
    if list(bias.shape) != [channels]:
        raise ValueError(f"bias has shape {list(bias.shape)}; the output has {channels} channels")


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
    mask: Tensor | None,
    boundary: int,
    axes: int | None = None,
    whole_steps: bool = False,
) -> list[int]:
    """Check every argument; return the shape of the output. The operator takes no ``output_padding`` of whole steps."""
    check_floating("input", input)
    axes = min(max(input.dim() - 2, 1), 3) if axes is None else axes
    for name, value in {"input": input, "offset": offset, "weight": weight, "mask": mask}.items():
        if value is None and name == "mask":
            continue
        check_alike(name, value, "input", input, dtype=name != "offset")
        assert value is not None
        if value.dim() != axes + 2:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; a {axes}-D deformable convolution needs {axes + 2} axes"
            )
    check_offset_dtype(offset, "an input", input.dtype)
    name_of("boundary", boundary)

    batch, channels, *size = input.shape
    in_channels, group_channels, *kernel_size = weight.shape
    if min(weight.shape) < 1:
        raise ValueError(f"weight has shape {list(weight.shape)}; every axis must have at least one element")
    if channels != in_channels:
        raise ValueError(f"input has {channels} channels; weight has {in_channels} input channels")
    if groups < 1 or in_channels % groups:
        raise ValueError(f"groups is {groups}; it must divide weight's {in_channels} input channels")

    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    check_window("input", size, **window, output_padding=output_padding, dilation=dilation)
    for name, steps, what, lengths in (
        ("stride", stride, "input", size),
        ("dilation", dilation, "kernel", kernel_size),
    ):
        if any(step * length > FARTHEST for step, length in zip(steps, lengths, strict=True)):
            raise ValueError(f"{name} is {list(steps)}; times {what} {times(lengths)} it must be at most 2^40")
    if not whole_steps and any(extra >= step for extra, step in zip(output_padding, stride, strict=True)):
        raise ValueError(
            f"output_padding is {list(output_padding)}; each value must be less than stride {list(stride)}"
        )
    out_size = transposed_output_size(size, kernel_size, stride, padding, output_padding, dilation)
    if min(out_size) < 1:
        raise ValueError(
            f"output size is {times(out_size)}, from input {times(size)}, kernel {times(kernel_size)}, "
            f"stride {times(stride)}, padding {times(padding)}, output_padding {times(output_padding)}, "
            f"dilation {times(dilation)}; it must be at least 1 on every axis"
        )
    out_channels = groups * group_channels
    check_offset_channels(offset, mask, kernel_size, "the output", out_channels)
    for name, value in (("offset", offset), ("mask", mask)):
        if value is not None:
            if value.shape[0] != batch:
                raise ValueError(f"{name} has batch size {value.shape[0]}; input has {batch}")
            if list(value.shape[2:]) != size:
                raise ValueError(f"{name} has spatial size {times(value.shape[2:])}; input has {times(size)}")
    return [batch, out_channels, *out_size]


_operator = define_adjoint(
    "deform_conv_transpose(Tensor input, Tensor offset, Tensor weight, int[] stride, int[] padding, "
    "int[] output_padding, int groups, int[] dilation, Tensor? mask, int boundary) -> Tensor",
    of="deform_conv",
    arguments=(RESULT, "offset", "weight", None, "stride", "padding", "dilation", "mask", "boundary"),
    reference=reference.deform_conv_transpose,
    check=_check,
    differentiable=("input", "offset", "weight", "mask"),
    coordinates=("offset",),
    batched=("input", "offset", "mask"),
)
