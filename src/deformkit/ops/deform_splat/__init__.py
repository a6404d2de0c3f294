"""Splatting: values added to a field around given points, the adjoint of deformable sampling."""

from .op import deform_splat as deform_splat
