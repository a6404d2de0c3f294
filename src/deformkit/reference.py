"""The slow, readable definition of every operator, on any device and in any floating dtype."""

from .ops.deform_conv.reference import deform_conv as deform_conv
