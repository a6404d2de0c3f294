"""Layers over the operators, in the manner of :mod:`torch.nn`."""

from .deform_conv import DeformConv1d as DeformConv1d
from .deform_conv import DeformConv2d as DeformConv2d
from .deform_conv import DeformConv3d as DeformConv3d
from .deform_conv import PackedDeformConv1d as PackedDeformConv1d
from .deform_conv import PackedDeformConv2d as PackedDeformConv2d
from .deform_conv import PackedDeformConv3d as PackedDeformConv3d
from .ms_deform_attn import MSDeformAttn as MSDeformAttn
