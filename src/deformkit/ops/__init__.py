"""The operators, one room each; see CONTRIBUTING for what a room holds."""

from .deform_aggregate import deform_aggregate as deform_aggregate
from .deform_conv import deform_conv1d as deform_conv1d
from .deform_conv import deform_conv2d as deform_conv2d
from .deform_conv import deform_conv3d as deform_conv3d
from .deform_conv_transpose import deform_conv_transpose1d as deform_conv_transpose1d
from .deform_conv_transpose import deform_conv_transpose2d as deform_conv_transpose2d
from .deform_conv_transpose import deform_conv_transpose3d as deform_conv_transpose3d
from .deform_correlate import deform_correlate as deform_correlate
from .deform_roi_pool import deform_roi_pool as deform_roi_pool
from .deform_sample import deform_sample as deform_sample
from .deform_splat import deform_splat as deform_splat
from .ms_deform_attn import ms_deform_attn as ms_deform_attn

# After the operators, for whose kernels it registers launchers.
from . import gpu as gpu  # isort: skip
