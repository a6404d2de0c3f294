"""The layers of deformops: ``from deformkit.compat.deformops.nn import DeformConv2d``.

Its releases use the same names for different layers. :mod:`.nn` has those before release 3, as its README describes
them: ``DeformConv2d(dims)`` predicts its own offsets, and ``DeformAttn2d`` is multi-scale attention. :mod:`.v3.nn` has
those of release 3: ``DeformConv2d(in_channels, out_channels, kernel_size)`` is torchvision's, and ``DeformAttn2d``
samples a single scale.
"""

from . import nn as nn
from . import v3 as v3
