"""Stands in for the compiled module ``DCNv3`` of InternImage.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in that place. For a layer see
:class:`deformkit.nn.DCNv3`.
"""

from functools import partial

from torch import Tensor

from ... import __version__ as _version
from ...ops._shape import check_tensor
from ._published import Window, backward, check_packed, in_our_order

__all__ = ["dcnv3_backward", "dcnv3_forward"]
__version__ = f"deformkit {_version}"


def dcnv3_forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    im2col_step: int = 256,
    remove_center: int = False,
) -> Tensor:
    """Deformable aggregation of ``input [N, H, W, G*C]``, see :func:`deformkit.deform_aggregate`.

    ``offset [N, Hout, Wout, G*K*2]`` and ``mask [N, Hout, Wout, G*K]``, or ``[N, Hout, Wout, G, K]``, count the taps
    column after column; the offsets are (x, y). The output is ``[N, Hout, Wout, G*C]``.
    """
    numbers = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    window = Window.of(numbers, group, group_channels, offset_scale, remove_center)
    return window.aggregate(*_unpack(window, input, offset, mask))


def dcnv3_backward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    grad_output: Tensor,
    im2col_step: int = 256,
    remove_center: int = False,
) -> list[Tensor]:
    """The gradients by ``input``, ``offset`` and ``mask`` for that of the output."""
    numbers = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    window = Window.of(numbers, group, group_channels, offset_scale, remove_center)
    return backward(window, partial(_unpack, window), (input, offset, mask), grad_output)


def _unpack(window: Window, input: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, taps = window.heads(input), len(window.taps)
    weights = window.group * taps
    check_packed("offset", offset, 2 * weights)
    check_tensor("mask", mask)
    if mask.dim() == 5 and mask.shape[3:] == (window.group, taps):
        mask = mask.flatten(3)
    check_packed("mask", mask, weights)
    by_tap = offset.unflatten(-1, (window.group, -1, 2)), mask.to(input.dtype).unflatten(-1, (window.group, -1))
    return value, *in_our_order(window, *by_tap)
