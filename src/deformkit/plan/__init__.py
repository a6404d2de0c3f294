"""``deformkit plan``: what a training step costs on many GPUs, computed from shapes and data sheets."""

from .command import plan as plan
