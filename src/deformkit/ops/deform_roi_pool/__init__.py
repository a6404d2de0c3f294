"""Deformable RoI pooling."""

from .op import deform_roi_pool as deform_roi_pool
