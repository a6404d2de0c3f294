"""Multi-scale deformable attention."""

from .op import ms_deform_attn as ms_deform_attn
