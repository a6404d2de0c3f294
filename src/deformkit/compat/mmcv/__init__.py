"""``mmcv.ops``: deformable convolution, RoI pooling and multi-scale deformable attention of images."""

from ..deformable_detr import MSDeformAttnFunction as MultiScaleDeformableAttnFunction
from ..deformable_detr import ms_deform_attn_core_pytorch as multi_scale_deformable_attn_pytorch
from .attention import MultiScaleDeformableAttention
from .conv import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    deform_conv2d,
    modulated_deform_conv2d,
)
from .roi_pool import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack, deform_roi_pool

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "deform_conv2d",
    "deform_roi_pool",
    "modulated_deform_conv2d",
    "multi_scale_deformable_attn_pytorch",
]
