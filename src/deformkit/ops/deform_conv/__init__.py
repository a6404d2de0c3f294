"""Deformable convolution, v1 and v2."""

from .op import deform_conv1d as deform_conv1d
from .op import deform_conv2d as deform_conv2d
from .op import deform_conv3d as deform_conv3d
