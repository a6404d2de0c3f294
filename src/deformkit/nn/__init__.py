"""Layers that call the operators, in the style of :mod:`torch.nn`."""

from ._convert import dcnv3_state_dict as dcnv3_state_dict
from ._convert import dcnv4_state_dict as dcnv4_state_dict
from .correlation_lookup import CorrelationLookup as CorrelationLookup
from .dcn import DCNv3 as DCNv3
from .dcn import DCNv4 as DCNv4
from .deform_conv import DeformConv1d as DeformConv1d
from .deform_conv import DeformConv2d as DeformConv2d
from .deform_conv import DeformConv3d as DeformConv3d
from .deform_conv import PackedDeformConv1d as PackedDeformConv1d
from .deform_conv import PackedDeformConv2d as PackedDeformConv2d
from .deform_conv import PackedDeformConv3d as PackedDeformConv3d
from .deform_conv_transpose import DeformConvTranspose1d as DeformConvTranspose1d
from .deform_conv_transpose import DeformConvTranspose2d as DeformConvTranspose2d
from .deform_conv_transpose import DeformConvTranspose3d as DeformConvTranspose3d
from .deform_conv_transpose import PackedDeformConvTranspose1d as PackedDeformConvTranspose1d
from .deform_conv_transpose import PackedDeformConvTranspose2d as PackedDeformConvTranspose2d
from .deform_conv_transpose import PackedDeformConvTranspose3d as PackedDeformConvTranspose3d
from .deform_roi_pool import DeformRoIPool as DeformRoIPool
from .deform_roi_pool import PackedDeformRoIPool as PackedDeformRoIPool
from .guided_deform_attn import GuidedDeformAttn as GuidedDeformAttn
from .ms_deform_attn import MSDeformAttn as MSDeformAttn
from .softmax_splat import SoftmaxSplat as SoftmaxSplat
from .warp import Warp1d as Warp1d
from .warp import Warp2d as Warp2d
from .warp import Warp3d as Warp3d
