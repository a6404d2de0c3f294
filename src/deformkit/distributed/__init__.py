"""Deformable operators and layers on tensors that are divided among ranks."""

from ._attention import Traffic as Traffic
from ._attention import attention_traffic as attention_traffic
from ._attention import spatial_ms_deform_attn as spatial_ms_deform_attn
from ._spatial import spatial_deform_aggregate as spatial_deform_aggregate
from ._spatial import spatial_deform_conv as spatial_deform_conv
from ._spatial import spatial_deform_sample as spatial_deform_sample
from ._strategy import register as register
from ._tensor_parallel import TensorParallel as TensorParallel
from ._tensor_parallel import parallel_plan as parallel_plan

__all__ = [
    "TensorParallel",
    "Traffic",
    "attention_traffic",
    "parallel_plan",
    "register",
    "spatial_deform_aggregate",
    "spatial_deform_conv",
    "spatial_deform_sample",
    "spatial_ms_deform_attn",
]

register()
