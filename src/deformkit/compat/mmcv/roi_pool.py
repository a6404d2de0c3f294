"""Deformable RoI pooling as in ``mmcv.ops``: function and layers."""

from collections.abc import Sequence

from torch import Tensor

from ... import nn
from ...ops import deform_roi_pool as _deform_roi_pool
from ...ops._shape import check_floating, compute_dtype
from .._autocast import without_autocast


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Deformable RoI pooling, as ``mmcv.ops.deform_roi_pool``; see :func:`deformkit.deform_roi_pool`.

    Args:
        input: ``[B, C, H, W]``.
        rois: ``[R, 5]``: index of the image, x1, y1, x2, y2; in half precision they are read as float32.
        offset: ``[R, 2, *output_size]``, along x, then along y, or None.
        output_size: number of bins along h and w.
        spatial_scale: pixels of ``input`` for one unit of ``rois``.
        sampling_ratio: samples in a bin along each axis; 0: one for each pixel that a bin is long, rounded up.
        gamma: how far an offset of 1 moves a bin, in lengths of its RoI.

    Returns:
        ``[R, C, *output_size]`` in the dtype of ``input``.

    Raises:
        TypeError: an argument is not a tensor or no number, or has a wrong dtype.
        ValueError: a shape, device, size, number or batch index does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> rois = torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0], [1.0, 0.0, 0.0, 480.0, 320.0]])
        >>> deform_roi_pool(torch.randn(2, 8, 20, 30), rois, None, (7, 7), 1 / 16).shape
        torch.Size([2, 8, 7, 7])
    """
    rois = _whole_rois(input, rois)
    with without_autocast(input):
        return _deform_roi_pool(
            input,
            rois,
            offset,
            output_size=output_size,
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            gamma=gamma,
        )


class DeformRoIPool(nn.DeformRoIPool):
    """The layer ``mmcv.ops.DeformRoIPool``: :class:`deformkit.nn.DeformRoIPool`, whose RoIs may be half precision too.

    Arguments and shapes as there.

    Example:
        >>> import torch
        >>> layer = DeformRoIPool((7, 7), spatial_scale=1 / 16)
        >>> layer(torch.randn(2, 8, 20, 30), torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0]])).shape
        torch.Size([1, 8, 7, 7])
    """

    def _pool(self, input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
        rois = _whole_rois(input, rois)
        with without_autocast(input):
            return super()._pool(input, rois, offset)


class DeformRoIPoolPack(DeformRoIPool, nn.PackedDeformRoIPool):
    """The layer ``mmcv.ops.DeformRoIPoolPack``: :class:`deformkit.nn.PackedDeformRoIPool` by mmcv's name.

    Arguments and shapes as there.

    Example:
        >>> import torch
        >>> layer = DeformRoIPoolPack((7, 7), 8, spatial_scale=1 / 16)
        >>> layer(torch.randn(2, 8, 20, 30), torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0]])).shape
        torch.Size([1, 8, 7, 7])
    """


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """The layer ``mmcv.ops.ModulatedDeformRoIPoolPack``: :class:`DeformRoIPoolPack` with a mask for its output.

    Arguments and shapes as there.

    Example:
        >>> import torch
        >>> layer = ModulatedDeformRoIPoolPack((7, 7), 8, spatial_scale=1 / 16)
        >>> layer(torch.randn(2, 8, 20, 30), torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0]])).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        numbers = (spatial_scale, sampling_ratio, gamma)
        super().__init__(output_size, output_channels, deform_fc_channels, *numbers, modulated=True)


def _whole_rois(input: Tensor, rois: Tensor) -> Tensor:
    """The RoIs in the dtype that the operator takes, whatever the host computes in."""
    check_floating("input", input)
    check_floating("rois", rois)
    return rois.to(compute_dtype(input.dtype))
