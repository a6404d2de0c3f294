"""The slow, readable definition of every operator, on any device and in any floating dtype."""

from .ops.deform_aggregate.reference import deform_aggregate as deform_aggregate
from .ops.deform_conv.reference import deform_conv as deform_conv
from .ops.deform_conv_transpose.reference import deform_conv_transpose as deform_conv_transpose
from .ops.deform_correlate.reference import deform_correlate as deform_correlate
from .ops.deform_roi_pool.reference import deform_roi_pool as deform_roi_pool
from .ops.deform_sample.reference import deform_sample as deform_sample
from .ops.deform_splat.reference import deform_splat as deform_splat
from .ops.ms_deform_attn.reference import ms_deform_attn as ms_deform_attn
