"""Stands in for ``deform_attn``, the compiled module of RVRT.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in that place. RVRT compiles its module when
it is imported: there, ``deform_attn_ext = load(...)`` becomes ``import deform_attn as deform_attn_ext``. For a layer
see :class:`deformkit.nn.GuidedDeformAttn`.
"""

from math import gcd, sqrt

import torch
from torch import Tensor

from ... import __version__ as _version
from ...nn._field import positions
from ...ops import deform_correlate, ms_deform_attn
from ...ops._shape import check_alike, check_floating, compute_dtype
from ...ops.sample.reference import tap_grid
from ._recomputed import recomputed

__all__ = ["deform_attn_backward", "deform_attn_forward"]
__version__ = f"deformkit {_version}"


@torch.no_grad()
def deform_attn_forward(
    q: Tensor,
    kv: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    attns: Tensor,
    mask_ones: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    attn_head: int,
    deform_group: int,
    clip_size: int,
) -> None:
    """Write to ``output`` the attention of ``q`` to the points of all frames of its clip.

    Args:
        q: ``[B, C, H, W]``, or with one more axis of length 1 behind the batch, which counts the frames of all clips.
        kv: ``[B / clip_size, clip_size, 2C, H, W]``, keys and behind them values.
        offset: ``[B, clip_size*deform_group*K*2, H, W]`` in pixels: frame after frame, beginning with the one of ``q``,
            for each group of channels of ``kv`` its taps, for each the shift along h, then along w.
        output: of the shape of ``q``.
        columns: not used, like ``attns`` and ``mask_ones``.
        attns: not used.
        mask_ones: not used.
        kernel_h: number of taps along h. The next arguments are those of a convolution, whose stride must be 1.
        kernel_w: along w.
        stride_h: along h.
        stride_w: along w.
        pad_h: along h.
        pad_w: along w.
        dilation_h: along h.
        dilation_w: along w.
        attn_head: number of heads.
        deform_group: number of groups of channels of ``kv``.
        clip_size: number of frames of a clip.
    """
    window = ((kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    output.copy_(_attend(q, kv, offset, *window, attn_head, deform_group, clip_size))


@torch.no_grad()
def deform_attn_backward(
    q: Tensor,
    kv: Tensor,
    offset: Tensor,
    columns: Tensor,
    attns: Tensor,
    mask_ones: Tensor,
    grad_attns: Tensor,
    grad_mask_ones: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    grad_offset: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    attn_head: int,
    deform_group: int,
    clip_size: int,
) -> None:
    """Write the gradients by ``q``, ``kv`` and ``offset`` to ``grad_q``, ``grad_kv`` and ``grad_offset``."""
    window = ((kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))

    def forward(q: Tensor, kv: Tensor, offset: Tensor) -> Tensor:
        return _attend(q, kv, offset, *window, attn_head, deform_group, clip_size)

    for target, grad in zip(
        (grad_q, grad_kv, grad_offset), recomputed(forward, (q, kv, offset), grad_output), strict=True
    ):
        target.copy_(grad)


Pair = tuple[int, int]


def _attend(
    q: Tensor,
    kv: Tensor,
    offset: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    heads: int,
    groups: int,
    frames: int,
) -> Tensor:
    """The output, of the shape of ``q``."""
    _check(q, kv, offset, kernel, stride, heads, groups, frames)
    clips, _, channels, *size = kv.shape
    dim = channels // 2 // heads
    # A head may read several groups of channels, or share one with others: parts of heads lie in one group each.
    part = gcd(dim, channels // groups)
    taps = tap_grid(kernel, [1, 1], stride, padding, dilation, q.device).reshape(-1, 2)
    dtype = compute_dtype(q.dtype)
    # [clips, query frame, other frame, group, tap, 2, pixels]
    shift = offset.reshape(clips, frames, frames, groups, len(taps), 2, size[0] * size[1]).to(dtype)
    # The first offsets of a frame are those into the frame itself: turn them, so that level t is frame t.
    order = torch.arange(frames, device=q.device)
    turned = shift[:, order[:, None], (order - order[:, None]) % frames]
    place = positions(size, dtype, q.device).flatten(0, 1)
    # [clips, frame * pixels, group, level, tap, 2], x first, normalised.
    pixel = turned.permute(0, 1, 6, 3, 2, 4, 5) + taps.to(dtype) + place[:, None, None, None]
    locations = ((pixel + 0.5) / pixel.new_tensor(size)).flip(-1).flatten(1, 2)

    starts = torch.arange(0, channels, part, device=q.device) // (channels // groups)
    of_key, of_value = starts.chunk(2)
    levels = [tuple(size)] * frames
    # [clips, frames * pixels, parts, part]
    keys, values = kv.flatten(3).transpose(2, 3).flatten(1, 2).unflatten(-1, (2, -1, part)).unbind(2)
    query = (
        q.reshape(clips, frames, channels // 2, size[0] * size[1])
        .transpose(2, 3)
        .flatten(1, 2)
        .unflatten(-1, (-1, part))
    )
    products = deform_correlate(query, keys.contiguous(), levels, locations[:, :, of_key])
    scores = products.unflatten(2, (heads, -1)).sum(3) / sqrt(dim)
    weights = scores.flatten(3).softmax(-1).view_as(scores).repeat_interleave(dim // part, 2)
    result = ms_deform_attn(values.contiguous(), levels, locations[:, :, of_value], weights)
    return result.unflatten(1, (frames, size[0] * size[1])).transpose(2, 3).reshape(q.shape)


def _check(
    q: Tensor, kv: Tensor, offset: Tensor, kernel: Pair, stride: Pair, heads: int, groups: int, frames: int
) -> None:
    check_floating("q", q)
    check_alike("kv", kv, "q", q)
    check_alike("offset", offset, "q", q)
    if stride != (1, 1):
        raise ValueError(f"stride is {stride}; it must be (1, 1), because the output has the size of q")
    if kv.dim() != 5 or kv.shape[1] != frames or kv.shape[2] % 2:
        raise ValueError(f"kv has shape {list(kv.shape)}; it must be [B / clip_size, {frames}, 2C, H, W]")
    clips, _, channels, height, width = kv.shape
    for name, count, divided in (("attn_head", heads, channels // 2), ("deform_group", groups, channels)):
        if count < 1 or divided % count:
            raise ValueError(f"{name} is {count}; it must divide {divided}, for kv of shape {list(kv.shape)}")
    expected = [clips * frames, channels // 2, height, width]
    if list(q.flatten(1, -3).shape if q.dim() > 3 else q.shape) != expected:
        raise ValueError(f"q has shape {list(q.shape)}; with kv of shape {list(kv.shape)} it must be {expected}")
    expected = [clips * frames, frames * groups * kernel[0] * kernel[1] * 2, height, width]
    if list(offset.shape) != expected:
        raise ValueError(f"offset has shape {list(offset.shape)}; it must be {expected}")
