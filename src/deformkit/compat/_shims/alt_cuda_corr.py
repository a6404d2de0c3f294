"""Stands in for ``alt_cuda_corr``, the compiled module of RAFT that computes correlations on demand.

This module is part of deformkit; :func:`deformkit.compat.install` puts it in that place. For a layer see
:class:`deformkit.nn.CorrelationLookup`.
"""

from functools import partial

import torch
from torch import Tensor

from ... import __version__ as _version
from ...nn.correlation_lookup import window_locations
from ...ops import deform_correlate
from ...ops._shape import check_alike, check_count, check_floating, compute_dtype
from ._recomputed import recomputed

__all__ = ["backward", "forward"]
__version__ = f"deformkit {_version}"


@torch.no_grad()
def forward(fmap1: Tensor, fmap2: Tensor, coords: Tensor, radius: int) -> list[Tensor]:
    """The scalar products of every pixel with a window of the other image; not divided by the root of the channels.

    Args:
        fmap1: ``[B, H, W, C]``.
        fmap2: ``[B, H2, W2, C]``.
        coords: ``[B, N, H, W, 2]``, (x, y) in pixels of ``fmap2``, the centre of each window.
        radius: r of the window.

    Returns:
        One tensor ``[B, N, (2r+1)^2, H, W]``, each window column after column.
    """
    return [_correlate(coords, radius, fmap1, fmap2)]


@torch.no_grad()
def backward(fmap1: Tensor, fmap2: Tensor, coords: Tensor, corr_grad: Tensor, radius: int) -> list[Tensor]:
    """The gradients by ``fmap1``, ``fmap2`` and ``coords``; the last is 0, as in RAFT, which detaches ``coords``."""
    grads = recomputed(partial(_correlate, coords, radius), (fmap1, fmap2), corr_grad)
    return [*grads, torch.zeros_like(coords)]


def _correlate(coords: Tensor, radius: int, fmap1: Tensor, fmap2: Tensor) -> Tensor:
    check_floating("fmap1", fmap1)
    check_alike("fmap2", fmap2, "fmap1", fmap1)
    check_floating("coords", coords)
    check_alike("coords", coords, "fmap1", fmap1, dtype=False)
    check_count("radius", radius, 0)
    for name, tensor in (("fmap1", fmap1), ("fmap2", fmap2)):
        if tensor.dim() != 4 or tensor.shape[0] != fmap1.shape[0] or tensor.shape[-1] != fmap1.shape[-1]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; both maps must be [B, H, W, C]")
    batch, height, width, _ = fmap1.shape
    if coords.dim() != 5 or [*coords.shape[:1], *coords.shape[2:]] != [batch, height, width, 2]:
        raise ValueError(f"coords has shape {list(coords.shape)}; it must be [{batch}, N, {height}, {width}, 2]")
    size, diameter = tuple(fmap2.shape[1:3]), 2 * radius + 1
    # [B, H*W, N, 2] to [B, H*W, 1, 1, N*window, 2]
    places = coords.to(compute_dtype(fmap1.dtype)).flatten(2, 3).transpose(1, 2).flip(-1)
    locations = window_locations(places, [size], radius).flatten(2, 4)[:, :, None, None]
    query, key = fmap1.flatten(1, 2).unsqueeze(2), fmap2.flatten(1, 2).unsqueeze(2)
    products = deform_correlate(query, key, [size], locations)
    windows = products.reshape(batch, height, width, coords.shape[1], diameter, diameter).permute(0, 3, 5, 4, 1, 2)
    return windows.flatten(2, 3)
