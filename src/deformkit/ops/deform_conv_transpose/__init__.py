"""Transposed deformable convolution, the adjoint of the deformable convolution."""

from .op import deform_conv_transpose1d as deform_conv_transpose1d
from .op import deform_conv_transpose2d as deform_conv_transpose2d
from .op import deform_conv_transpose3d as deform_conv_transpose3d
