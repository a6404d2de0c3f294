"""Deformable sampling: the value of a field at given points."""

from .op import deform_sample as deform_sample
