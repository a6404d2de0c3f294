"""Where the deformable layers of a model look: positions, weights and levels, pictures and an interactive page."""

from ._collect import Layer as Layer
from ._sampling import Sampling as Sampling
from ._sampling import sampling as sampling
