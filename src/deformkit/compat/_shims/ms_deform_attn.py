"""Stands in for two compiled modules: ``MultiScaleDeformableAttention`` and ``groundingdino._C``.

The first is what Deformable DETR and its descendants build, the second what Grounding DINO builds. This module is part
of deformkit; :func:`deformkit.compat.install` puts it in their place.
"""

from typing import Any

from torch import Tensor

from ... import __version__ as _version
from ...ops._levels import SpatialShapes
from .._attention import attend, attend_backward

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]
__version__ = f"deformkit {_version}"


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """The output of :func:`deformkit.compat.deformable_detr.MSDeformAttnFunction.apply`, with its arguments."""
    return attend(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Any,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> list[Tensor]:
    """The gradients by ``value``, ``sampling_loc`` and ``attn_weight`` for that of the output."""
    return attend_backward(value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output)
