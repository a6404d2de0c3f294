"""Deformable aggregation, the core of DCNv3 and DCNv4."""

from .op import deform_aggregate as deform_aggregate
