"""The position-sensitive RoI pooling of DCNv2 by the names of ``dcn_v2``."""

from typing import Any

import torch
from torch import Tensor, nn

from ...ops import deform_roi_pool
from ...ops._shape import check_tensor, compute_dtype
from ._recomputed import recomputed


def dcn_v2_pooling(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    spatial_scale: float,
    pooled_size: int,
    output_dim: int,
    no_trans: bool,
    group_size: int = 1,
    part_size: int | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.0,
) -> Tensor:
    """:func:`deformkit.deform_roi_pool` with a ``group_size``, and the corners and parts of DCNv2.

    Corners are rounded to whole numbers, and the last pixel belongs to the RoI. A RoI is at least 0.1 pixels long. The
    samples of a bin start at its first edge. Each of ``part_size`` parts along an axis has an offset, which all of its
    bins share. ``offset [R, 2 * classes, part_size, part_size]`` is ignored with ``no_trans``.
    """
    check_tensor("input", input)
    check_tensor("rois", rois)
    if input.dim() != 4 or input.shape[1] != output_dim * group_size**2:
        raise ValueError(
            f"input has shape {list(input.shape)}; with output_dim={output_dim} and group_size={group_size} it must be "
            f"[B, {output_dim * group_size**2}, H, W]"
        )
    rois = rois.detach().to(compute_dtype(input.dtype))
    corners = rois[:, 1:]
    corners = (corners.abs() + 0.5).floor() * corners.sign()
    low, length = corners[:, :2], corners[:, 2:] + 1 - corners[:, :2]
    length = length.clamp(min=0.1 / spatial_scale)
    # Samples lie in the middle of their share of a bin, not at its first edge.
    low = low - length / (2 * sample_per_part * pooled_size)
    moved = None
    if not no_trans:
        check_tensor("offset", offset)
        part = torch.arange(pooled_size, device=offset.device) * (part_size or pooled_size) // pooled_size
        moved = offset[..., part[:, None], part]
    return deform_roi_pool(
        input,
        torch.cat([rois[:, :1], low, low + length], 1),
        moved,
        output_size=pooled_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sample_per_part,
        gamma=trans_std,
        group_size=group_size,
    )


# The extensions take numbers in this order, by their places.
NUMBERS = (
    "no_trans",
    "spatial_scale",
    "output_dim",
    "group_size",
    "pooled_size",
    "part_size",
    "sample_per_part",
    "trans_std",
)


@torch.no_grad()
def psroi_pooling_forward(input: Tensor, rois: Tensor, offset: Tensor, *numbers: float) -> tuple[Tensor, Tensor]:
    """The function of the extensions: the output of :func:`dcn_v2_pooling`, and what is to be given to the backward."""
    named: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
    output = dcn_v2_pooling(input, rois, offset, **named)
    # The number of samples in each mean; the backward here has no use for it.
    return output, input.new_empty(0)


@torch.no_grad()
def psroi_pooling_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output_count: Tensor,
    *numbers: float,
) -> tuple[Tensor, Tensor]:
    """The gradients by ``input`` and ``offset``, which is 0 with ``no_trans``."""
    named: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))

    def forward(input: Tensor, *moved: Tensor) -> Tensor:
        return dcn_v2_pooling(input, rois, moved[0] if moved else offset, **named)

    grads = recomputed(forward, [input] if named["no_trans"] else [input, offset], grad_output)
    return grads[0], torch.zeros_like(offset) if named["no_trans"] else grads[1]


class DCNv2Pooling(nn.Module):
    """The layer ``DCNv2Pooling``, which is given its offsets; see :func:`dcn_v2_pooling`."""

    def __init__(
        self,
        spatial_scale: float,
        pooled_size: int,
        output_dim: int,
        no_trans: bool,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.spatial_scale = spatial_scale
        self.pooled_size = pooled_size
        self.output_dim = output_dim
        self.no_trans = no_trans
        self.group_size = group_size
        self.part_size = pooled_size if part_size is None else part_size
        self.sample_per_part = sample_per_part
        self.trans_std = trans_std

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
        """Pool each RoI at bins that ``offset`` moves, unless the layer has ``no_trans``."""
        return self._pool(input, rois, offset, self.no_trans)

    def _pool(self, input: Tensor, rois: Tensor, offset: Tensor, no_trans: bool) -> Tensor:
        return dcn_v2_pooling(
            input,
            rois,
            offset,
            self.spatial_scale,
            self.pooled_size,
            self.output_dim,
            no_trans,
            self.group_size,
            self.part_size,
            self.sample_per_part,
            self.trans_std,
        )


class DCNPooling(DCNv2Pooling):
    """The layer ``DCNPooling``, which predicts offsets and a mask from a first pooling by ``offset_mask_fc``."""

    def __init__(
        self,
        spatial_scale: float,
        pooled_size: int,
        output_dim: int,
        no_trans: bool,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.0,
        deform_fc_dim: int = 1024,
    ) -> None:
        super().__init__(
            spatial_scale, pooled_size, output_dim, no_trans, group_size, part_size, sample_per_part, trans_std
        )
        self.deform_fc_dim = deform_fc_dim
        if not no_trans:
            bins = pooled_size**2
            self.offset_mask_fc = nn.Sequential(
                nn.Linear(bins * output_dim, deform_fc_dim),
                nn.ReLU(),
                nn.Linear(deform_fc_dim, deform_fc_dim),
                nn.ReLU(),
                nn.Linear(deform_fc_dim, bins * 3),
            )
            for parameter in self.offset_mask_fc[4].parameters():
                nn.init.zeros_(parameter)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]  # it predicts the offsets
        """Pool each RoI at the bins that the layer predicts, times the mask that it predicts."""
        plain = self._pool(input, rois, input.new_empty(0), True)
        if self.no_trans:
            return plain
        size = self.pooled_size
        predicted = self.offset_mask_fc(plain.flatten(1)).reshape(len(rois), 3, size, size)
        return self._pool(input, rois, predicted[:, :2], False) * predicted[:, 2:].sigmoid()
