"""The layers of deformops 3.x: ``from deformkit.compat.deformops.v3.nn import DeformSample2d``."""

from . import nn as nn
