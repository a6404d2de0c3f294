"""Stands in for ``deformable_aggregation_ext`` and ``deformable_aggregation_with_depth_ext`` of Sparse4D.

SparseDrive, DiffusionDrive and others build the same. This module is part of deformkit;
:func:`deformkit.compat.install` puts it in their place. For a layer see :class:`deformkit.nn.DeformableAggregation`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import __version__ as _version
from ...nn.deformable_aggregation import aggregate_views
from ...ops import ms_deform_attn
from ...ops._levels import SpatialShapes, level_sizes
from ...ops._shape import check_alike, check_floating, check_tensor, prod
from .._attention import check_level_start_index
from ._recomputed import recomputed

__all__ = [
    "deformable_aggregation_backward",
    "deformable_aggregation_forward",
    "deformable_aggregation_with_depth_backward",
    "deformable_aggregation_with_depth_forward",
]
__version__ = f"deformkit {_version}"


@torch.no_grad()
def deformable_aggregation_forward(
    mc_ms_feat: Tensor, spatial_shape: Any, scale_start_index: Any, sampling_location: Tensor, weights: Tensor
) -> Tensor:
    """Read the feature maps of all cameras at key points.

    Args:
        mc_ms_feat: ``[B, S, C]``, the maps one after the other: all scales of the first camera, then of the second; or
            ``[B, V, S, C]``, where all V cameras have the same scales.
        spatial_shape: ``[V, scales, 2]``, the size (h, w) of each map; ``[scales, 2]`` in the second form.
        scale_start_index: ``[V, scales]`` or ``[scales]``, where each map starts. It follows from the sizes: an index
            on the CPU that contradicts them is an error.
        sampling_location: ``[B, Q, P, V, 2]``, (x, y) from 0 to 1; points outside are not read. Or ``[B, Q, V, 2]``.
        weights: ``[B, Q, P, V, scales, G]``, or ``[B, Q, V, scales, G]``.

    Returns:
        ``[B, Q, C]``.
    """
    views = _Views.of(mc_ms_feat, spatial_shape, scale_start_index, sampling_location, weights, 2)
    return views.aggregate(mc_ms_feat, sampling_location, weights)


@torch.no_grad()
def deformable_aggregation_backward(
    mc_ms_feat: Tensor,
    spatial_shape: Any,
    scale_start_index: Any,
    sampling_location: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_mc_ms_feat: Tensor,
    grad_sampling_location: Tensor,
    grad_weights: Tensor,
) -> None:
    """Write the gradients by ``mc_ms_feat``, ``sampling_location`` and ``weights`` to the last three tensors."""
    views = _Views.of(mc_ms_feat, spatial_shape, scale_start_index, sampling_location, weights, 2)
    grads = recomputed(views.aggregate, (mc_ms_feat, sampling_location, weights), grad_output)
    for target, grad in zip((grad_mc_ms_feat, grad_sampling_location, grad_weights), grads, strict=True):
        target.copy_(grad)


@torch.no_grad()
def deformable_aggregation_with_depth_forward(
    mc_ms_feat: Tensor,
    spatial_shape: Any,
    scale_start_index: Any,
    sampling_location: Tensor,
    weights: Tensor,
    num_depths: int,
) -> Tensor:
    """:func:`deformable_aggregation_forward` where a point also has a depth, and every pixel a probability of each.

    The last ``num_depths`` channels of ``mc_ms_feat [..., C + num_depths]`` are the probabilities. The third coordinate
    of ``sampling_location`` counts depths from 0; a pixel is multiplied by its probability there, interpolated linearly
    and 0 beyond the first and the last.
    """
    views = _Views.of(mc_ms_feat, spatial_shape, scale_start_index, sampling_location, weights, 3)
    return views.aggregate_at_depth(num_depths, mc_ms_feat, sampling_location, weights)


@torch.no_grad()
def deformable_aggregation_with_depth_backward(
    mc_ms_feat: Tensor,
    spatial_shape: Any,
    scale_start_index: Any,
    sampling_location: Tensor,
    weights: Tensor,
    num_depths: int,
    grad_output: Tensor,
    grad_mc_ms_feat: Tensor,
    grad_sampling_location: Tensor,
    grad_weights: Tensor,
) -> None:
    """Write the gradients by ``mc_ms_feat``, ``sampling_location`` and ``weights`` to the last three tensors."""
    views = _Views.of(mc_ms_feat, spatial_shape, scale_start_index, sampling_location, weights, 3)
    function = partial(views.aggregate_at_depth, num_depths)
    grads = recomputed(function, (mc_ms_feat, sampling_location, weights), grad_output)
    for target, grad in zip((grad_mc_ms_feat, grad_sampling_location, grad_weights), grads, strict=True):
        target.copy_(grad)


class _Views(NamedTuple):
    """The maps of a call."""

    sizes: list[list[int]]
    cameras: int

    @classmethod
    def of(
        cls,
        mc_ms_feat: Tensor,
        spatial_shape: Any,
        scale_start_index: Any,
        sampling_location: Tensor,
        weights: Tensor,
        coordinates: int,
    ) -> "_Views":
        """Check the arguments of a call."""
        check_floating("mc_ms_feat", mc_ms_feat)
        for name, tensor in (("sampling_location", sampling_location), ("weights", weights)):
            check_tensor(name, tensor)
            check_alike(name, tensor, "mc_ms_feat", mc_ms_feat)
        by_camera = mc_ms_feat.dim() == 4
        if mc_ms_feat.dim() not in (3, 4):
            raise ValueError(f"mc_ms_feat has shape {list(mc_ms_feat.shape)}; it must be [B, S, C] or [B, V, S, C]")
        if sampling_location.dim() not in (4, 5) or sampling_location.shape[-1] != coordinates:
            raise ValueError(
                f"sampling_location has shape {list(sampling_location.shape)}; it must be "
                f"[B, Q, P, V, {coordinates}] or [B, Q, V, {coordinates}]"
            )
        cameras = sampling_location.shape[-2]
        sizes = _sizes(spatial_shape)
        check_level_start_index(scale_start_index, sizes)
        if by_camera:
            if mc_ms_feat.shape[1] != cameras:
                raise ValueError(f"mc_ms_feat has {mc_ms_feat.shape[1]} cameras; sampling_location has {cameras}")
            sizes = sizes * cameras
        if not cameras or len(sizes) % cameras:
            raise ValueError(f"spatial_shape has {len(sizes)} maps; sampling_location has {cameras} cameras")
        groups = weights.shape[-1] if weights.dim() else 0
        expected = [*sampling_location.shape[:-1], len(sizes) // cameras, groups]
        if list(weights.shape) != expected:
            raise ValueError(f"weights has shape {list(weights.shape)}; it must be {[*expected[:-1], 'G']}")
        return cls(sizes, cameras)

    def aggregate(self, mc_ms_feat: Tensor, sampling_location: Tensor, weights: Tensor) -> Tensor:
        """The output of a call without depth."""
        maps, points, weights = self._in_our_layout(mc_ms_feat, sampling_location, weights)
        return aggregate_views(maps.unflatten(-1, (weights.shape[-1], -1)), self.sizes, points, weights)

    def aggregate_at_depth(
        self, num_depths: int, mc_ms_feat: Tensor, sampling_location: Tensor, weights: Tensor
    ) -> Tensor:
        """The output of a call with depth: the four pixels of each point, with their weights times probabilities.

        So the maps are not repeated for each depth.
        """
        channels = mc_ms_feat.shape[-1] - num_depths
        if num_depths < 1 or channels < 1:
            raise ValueError(f"num_depths is {num_depths}; mc_ms_feat has {mc_ms_feat.shape[-1]} channels in total")
        maps, points, weights = self._in_our_layout(mc_ms_feat, sampling_location, weights)
        values, probabilities = maps.split([channels, num_depths], -1)
        scales = len(self.sizes) // self.cameras
        seen = ((points[..., :2] > 0) & (points[..., :2] < 1)).all(-1)
        seen = (seen & (points[..., 2] > -1) & (points[..., 2] < num_depths)).transpose(2, 3)
        # [B, Q, levels, P, 3]
        inside = points.transpose(2, 3).masked_fill(~seen.unsqueeze(-1), 0.5)
        inside = inside.unsqueeze(3).expand(-1, -1, -1, scales, -1, -1).flatten(2, 3)
        extent = inside.new_tensor([[width, height] for height, width in self.sizes]).reshape(-1, 1, 2)
        pixel = inside[..., :2] * extent - 0.5
        first = pixel.detach().floor()
        fraction, level = pixel - first, torch.arange(len(self.sizes), device=points.device)
        starts = level.new_tensor([0, *(prod(size) for size in self.sizes)]).cumsum(0)[:-1].reshape(-1, 1)
        places, factors = [], []
        for along_x in (0, 1):
            for along_y in (0, 1):
                corner = first + first.new_tensor([along_x, along_y])
                exists = ((corner >= 0) & (corner < extent)).all(-1)
                corner = corner.clamp(min=torch.zeros_like(extent), max=extent - 1)
                part = torch.where(first.new_tensor([along_x, along_y]) > 0, fraction, 1 - fraction).prod(-1)
                index = starts + (corner[..., 1] * extent[..., 0] + corner[..., 0]).long()
                factors.append(part * _at_depth(probabilities, index, inside[..., 2]) * exists)
                places.append(corner / extent)
        # Weights [B, Q, G, levels, 4*P], with the factors of the pixels, which all groups share.
        weights = (weights * seen[:, :, :, None, :, None]).permute(0, 1, 5, 2, 3, 4).flatten(3, 4)
        weights = (weights.unsqueeze(-2) * torch.stack(factors, -2).unsqueeze(2)).flatten(-2)
        locations = torch.stack(places, -3).flatten(-3, -2).unsqueeze(2)
        maps = values.unflatten(-1, (weights.shape[2], -1))
        return ms_deform_attn(maps, self.sizes, locations, weights, mode="nearest")

    def _in_our_layout(
        self, mc_ms_feat: Tensor, sampling_location: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps ``[B, S, C]``, points ``[B, Q, P, V, N]`` and weights ``[B, Q, V, scales, P, G]``."""
        if sampling_location.dim() == 4:
            sampling_location, weights = sampling_location.unsqueeze(2), weights.unsqueeze(2)
        maps = mc_ms_feat.flatten(1, 2) if mc_ms_feat.dim() == 4 else mc_ms_feat
        return maps, sampling_location, weights.permute(0, 1, 3, 4, 2, 5)


def _at_depth(probabilities: Tensor, index: Tensor, depth: Tensor) -> Tensor:
    """``probabilities [B, S, depths]`` at the pixels ``index``, interpolated along the depths."""
    depths, shape = probabilities.shape[-1], index.shape
    low = depth.detach().floor()
    found = []
    for plane, part in ((low, 1 - (depth - low)), (low + 1, depth - low)):
        exists = (plane >= 0) & (plane < depths)
        place = index * depths + plane.clamp(0, depths - 1).long()
        picked = probabilities.flatten(1).gather(1, place.flatten(1)).view(shape)
        found.append(picked * part * exists)
    return found[0] + found[1]


def _sizes(spatial_shape: SpatialShapes | Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The sizes of all maps, of a tensor or lists with one axis for the cameras or none."""
    flat = torch.as_tensor(spatial_shape)
    if flat.dim() not in (2, 3) or flat.shape[-1] != 2:
        raise ValueError(f"spatial_shape has shape {list(flat.shape)}; it must be [V, scales, 2] or [scales, 2]")
    sizes = level_sizes("spatial_shape", flat.reshape(-1, 2), 2, "sampling_location has x and y")
    return [list(size) for size in sizes]
