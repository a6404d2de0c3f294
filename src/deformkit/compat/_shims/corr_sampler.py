"""Stands in for ``corr_sampler``, the compiled module of RAFT-Stereo that reads windows of a correlation volume.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in that place. For a layer that needs no
volume see :class:`deformkit.nn.CorrelationLookup`.
"""

from functools import partial

import torch
from torch import Tensor

from ... import __version__ as _version
from ...nn._field import positions
from ...ops import deform_sample
from ...ops._shape import check_alike, check_count, check_floating, compute_dtype
from ._recomputed import recomputed

__all__ = ["backward", "forward"]
__version__ = f"deformkit {_version}"


@torch.no_grad()
def forward(volume: Tensor, coords: Tensor, radius: int) -> list[Tensor]:
    """The values of each pixel's part of the volume in a window.

    Args:
        volume: ``[B, H, W, W2]``, for each pixel its correlations with a row; or ``[B, H, W, H2, W2]``, with an image.
        coords: ``[B, 1 or 2, H, W]``, (x, y) in pixels, the centre of each window; y is not read for a row.
        radius: r of the window.

    Returns:
        One tensor ``[B, 2r+1, H, W]``, or ``[B, 2r+1, 2r+1, H, W]``, first along x, then along y.
    """
    return [_windows(coords, radius, volume)]


@torch.no_grad()
def backward(volume: Tensor, coords: Tensor, corr_grad: Tensor, radius: int) -> list[Tensor]:
    """The gradient by ``volume``; ``coords`` has none."""
    return recomputed(partial(_windows, coords, radius), (volume,), corr_grad)


def _windows(coords: Tensor, radius: int, volume: Tensor) -> Tensor:
    check_floating("volume", volume)
    check_floating("coords", coords)
    check_alike("coords", coords, "volume", volume, dtype=False)
    check_count("radius", radius, 0)
    axes = volume.dim() - 3
    if axes not in (1, 2):
        raise ValueError(f"volume has shape {list(volume.shape)}; it must be [B, H, W, W2] or [B, H, W, H2, W2]")
    batch, height, width = volume.shape[:3]
    if coords.dim() != 4 or [coords.shape[0], *coords.shape[2:]] != [batch, height, width] or coords.shape[1] < axes:
        raise ValueError(f"coords has shape {list(coords.shape)}; it must be [{batch}, {axes}, {height}, {width}]")
    dtype = compute_dtype(volume.dtype)
    shift = positions([2 * radius + 1] * axes, dtype, volume.device) - radius
    centre = coords[:, :axes].to(dtype).flip(1).flatten(2).transpose(1, 2)
    # Every pixel is a channel with points of its own: [B, H*W, *window, axes].
    points = centre.reshape(batch, height * width, *[1] * axes, axes) + shift
    sampled = deform_sample(volume.flatten(1, 2), points)
    return sampled.unflatten(1, (height, width)).movedim((1, 2), (-2, -1)).transpose(1, axes)
