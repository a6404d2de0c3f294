"""Deformable operators for PyTorch in one, two and three dimensions."""

from .ops import deform_conv1d as deform_conv1d
from .ops import deform_conv2d as deform_conv2d
from .ops import deform_conv3d as deform_conv3d

from . import reference as reference

__version__ = "0.1.0"
