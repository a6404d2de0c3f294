"""Deformable operators for PyTorch in one, two and three dimensions."""

from . import _kernels as _kernels
from . import nn as nn
from . import reference as reference
from .ops import deform_aggregate as deform_aggregate
from .ops import deform_conv1d as deform_conv1d
from .ops import deform_conv2d as deform_conv2d
from .ops import deform_conv3d as deform_conv3d
from .ops import deform_roi_pool as deform_roi_pool
from .ops import ms_deform_attn as ms_deform_attn

__version__ = "0.1.0"
