"""The operators, one room each; see CONTRIBUTING for what a room holds."""

from .deform_aggregate import deform_aggregate as deform_aggregate
from .deform_conv import deform_conv1d as deform_conv1d
from .deform_conv import deform_conv2d as deform_conv2d
from .deform_conv import deform_conv3d as deform_conv3d
from .deform_roi_pool import deform_roi_pool as deform_roi_pool
from .deform_sample import deform_sample as deform_sample
from .ms_deform_attn import ms_deform_attn as ms_deform_attn

# After the operators, for whose kernels it registers launchers.
from . import gpu as gpu  # isort: skip
