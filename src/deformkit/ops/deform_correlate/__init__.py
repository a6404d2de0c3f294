"""Deformable correlation, the adjoint of multi-scale deformable attention by its weights."""

from .op import deform_correlate as deform_correlate
