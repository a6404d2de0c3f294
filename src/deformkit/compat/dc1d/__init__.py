"""The names of dc1d 0.2.0 on the operators of deformkit: ``from deformkit.compat.dc1d.nn import DeformConv1d``."""

from . import nn as nn
from . import ops as ops
from .nn import DeformConv1d as DeformConv1d
from .nn import PackedDeformConv1d as PackedDeformConv1d
from .nn import cLN as cLN
from .nn import gLN as gLN
from .ops import efficient_linterpolate as efficient_linterpolate
from .ops import full_seq_linterpolate as full_seq_linterpolate
from .ops import kernel_width_linterpolate as kernel_width_linterpolate

# The release of dc1d with these names.
__version__ = "0.2.0"
