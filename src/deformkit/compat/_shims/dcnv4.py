"""Stands in for the package ``DCNv4``: its layers ``DCNv4`` and ``FlashDeformAttn``, its functions and ``DCNv4.ext``.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in that place.
"""

import sys
from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor

from ... import __version__ as _version
from ... import nn
from ...nn._convert import _transposed_taps
from ...ops._levels import SpatialShapes
from ...ops._shape import check_tensor, compute_dtype
from .. import deformable_detr
from .._attention import attend
from ._published import Window, backward, check_packed, in_our_order
from ._recomputed import recomputed

__all__ = [
    "DCNv4",
    "DCNv4Function",
    "FlashDeformAttn",
    "FlashDeformAttnFunction",
    "dcnv4_backward",
    "dcnv4_forward",
    "flash_deform_attn_backward",
    "flash_deform_attn_forward",
]
__version__ = f"deformkit {_version}"


def dcnv4_forward(
    value: Tensor,
    p_offset: Tensor,
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
    d_stride: int = 8,
    block_thread: int = 0,
    softmax: bool = False,
) -> Tensor:
    """Deformable aggregation of ``value [N, H, W, G*C]``, see :func:`deformkit.deform_aggregate`.

    ``p_offset [N, Hout, Wout, G*K*3]``, its channels rounded up to a multiple of 8, holds for each group its offsets,
    (x, y), and behind them its weights; the taps are counted column after column. With ``softmax`` the weights are its
    softmax over the taps. ``im2col_step``, ``d_stride`` and ``block_thread`` have no meaning here.
    """
    numbers = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    window = Window.of(numbers, group, group_channels, offset_scale, remove_center)
    return window.aggregate(*_unpack(window, softmax, value, p_offset))


def dcnv4_backward(
    value: Tensor,
    p_offset: Tensor,
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
    im2col_step: int,
    grad_output: Tensor,
    remove_center: int = False,
    d_stride: int = 8,
    block_thread: int = 0,
    softmax: bool = False,
) -> list[Tensor]:
    """The gradients by ``value`` and ``p_offset`` for that of the output."""
    numbers = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    window = Window.of(numbers, group, group_channels, offset_scale, remove_center)
    return backward(window, partial(_unpack, window, softmax), (value, p_offset), grad_output)


def flash_deform_attn_forward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_loc_attn: Tensor,
    im2col_step: int = 64,
    K: int = 8,
    d_stride: int = 8,
    block_thread: int = 0,
) -> Tensor:
    """Multi-scale deformable attention with the softmax inside, see :func:`deformkit.ms_deform_attn`.

    ``sampling_loc_attn [B, Q, H, L*K*3]`` holds for each head the locations of its points, (x, y), level by level, and
    behind them the logits of its weights; the softmax is over all levels and points. The output is ``[B, Q, H*D]``.
    """
    locations, logits = _split_attention(value, spatial_shapes, sampling_loc_attn, K)
    weights = logits.softmax(-1).view(locations.shape[:-1])
    return attend(value, spatial_shapes, level_start_index, locations, weights)


def flash_deform_attn_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_loc_attn: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
    K: int = 8,
    d_stride: int = 2,
    block_thread: int = 0,
) -> list[Tensor]:
    """The gradients by ``value`` and ``sampling_loc_attn`` for that of the output."""

    def forward(value: Tensor, sampling_loc_attn: Tensor) -> Tensor:
        return flash_deform_attn_forward(value, spatial_shapes, level_start_index, sampling_loc_attn, K=K)

    return recomputed(forward, (value, sampling_loc_attn), grad_output)


class FlashDeformAttnFunction:
    """The ``autograd.Function`` of the package: only ``apply``, which is differentiable through the operator."""

    apply = staticmethod(flash_deform_attn_forward)


class FlashDeformAttn(deformable_detr.MSDeformAttn):
    """The layer of that name: :class:`deformkit.compat.deformable_detr.MSDeformAttn`, whose state-dict it has.

    Locations are float32, where the package rounds them to half precision.
    """


class DCNv4Function:
    """The ``autograd.Function`` of the package: only ``apply``, which is differentiable through the operator."""

    apply = staticmethod(dcnv4_forward)


class DCNv4(nn.DCNv4):
    """The layer of the package: :class:`deformkit.nn.DCNv4` with its weights in the published order.

    A published state-dict is loaded as it is. The input is flat, ``[N, L, C]``, and square where no ``shape`` is given.
    Arguments that neither layer knows are not used, as in the package.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: int = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        **kwargs: Any,
    ) -> None:
        window = (kernel_size, stride, pad, dilation, group, offset_scale, dw_kernel_size)
        options = (center_feature_scale, bool(remove_center), output_bias, without_pointwise)
        super().__init__(channels, *window, *options)
        self._published_taps = _transposed_taps(kernel_size, bool(remove_center)).tolist()

    def _reset_parameters(self) -> None:
        # By this name FlashInternImage calls it when it is made.
        self.reset_parameters()

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The offsets and masks for an input, in the order of :class:`deformkit.nn.DCNv4`."""
        offset, mask = super().predict(input)
        return offset[..., self._published_taps, :].flip(-1), mask[..., self._published_taps]

    def forward(self, input: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The output ``[N, L, C]`` for an input ``[N, L, C]`` of spatial size ``shape``."""
        if shape is None and input.dim() == 3:
            side = isqrt(input.shape[1])
            if side**2 != input.shape[1]:
                raise ValueError(f"shape is None; {input.shape[1]} positions are no square, so it must be given")
            shape = (side, side)
        return super().forward(input, shape)


def _unpack(window: Window, softmax: bool, value: Tensor, p_offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, taps = window.heads(value), len(window.taps)
    check_packed("p_offset", p_offset, window.group * taps * 3, multiple_of=8)
    used = p_offset[..., : window.group * taps * 3].unflatten(-1, (window.group, taps * 3))
    offset, weight = used[..., : taps * 2].unflatten(-1, (taps, 2)), used[..., taps * 2 :].to(value.dtype)
    return heads, *in_our_order(window, offset, weight.softmax(-1) if softmax else weight)


def _split_attention(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_loc_attn: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """Locations ``[B, Q, H, L, K, 2]``, in at least float32, and logits ``[B, Q, H, L*K]``."""
    check_tensor("value", value)
    check_tensor("sampling_loc_attn", sampling_loc_attn)
    levels = len(spatial_shapes)
    if sampling_loc_attn.dim() != 4 or sampling_loc_attn.shape[-1] != levels * points * 3:
        raise ValueError(
            f"sampling_loc_attn has shape {list(sampling_loc_attn.shape)}; with {levels} levels and K={points} it must "
            f"be [B, Q, H, {levels * points * 3}]"
        )
    locations, logits = sampling_loc_attn.to(compute_dtype(value.dtype)).split(
        [levels * points * 2, levels * points], -1
    )
    return locations.unflatten(-1, (levels, points, 2)), logits


# The submodules of the package: all that it has lies here.
ext = functions = dcnv4_func = flash_deform_attn_func = sys.modules[__name__]
modules = dcnv4 = flash_deform_attn = ext
