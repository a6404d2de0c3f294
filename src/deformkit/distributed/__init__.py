"""Deformable operators and layers on tensors that are divided among ranks."""

from ._strategy import register as register
from ._tensor_parallel import TensorParallel as TensorParallel
from ._tensor_parallel import parallel_plan as parallel_plan

__all__ = ["TensorParallel", "parallel_plan", "register"]

register()
