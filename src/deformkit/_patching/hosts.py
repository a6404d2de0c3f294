"""The deformable functions and layers of host libraries, and their replacements with the same signatures."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..nn._linear import linear
from ..nn.ms_deform_attn import point_locations, value_and_weights
from ..ops._levels import SpatialShapes
from ..ops._shape import Mode, compute_dtype
from ..ops.deform_roi_pool.op import deform_roi_pool
from ..ops.ms_deform_attn.op import ms_deform_attn

PACKAGES = (
    "transformers",
    "torchvision",
    "mmcv",
    "ultralytics",
    "rfdetr",
    "deformable_attention",
    "monai",
    "voxelmorph",
)
HOSTS = f"{', '.join(PACKAGES)} or Deformable DETR"

_METHODS: dict[str, Mode] = {"default": "linear", "discrete": "nearest"}


@dataclass(frozen=True)
class Part:
    """A function, an autograd Function or a layer of a host, and its replacement."""

    module: str
    """A regular expression for the full name of the module that defines it."""
    name: str
    """The name of a function, or a regular expression for the name of a layer."""
    ours: Callable[..., Any] | str
    """The ``forward`` of a layer or the ``apply`` of an autograd Function; ``"host:name"`` refers to compat."""
    operator: str
    core: str | None = None
    """An attribute of the layer that must be a part too; otherwise the layer is not replaced."""
    only: Callable[[Any], bool] | None = None
    """Whether a layer has options that the replacement supports."""

    def function(self) -> Callable[..., Any]:
        """The replacement."""
        if callable(self.ours):
            return self.ours
        # compat is imported only if such a host is patched.
        host, names = self.ours.split(":")
        return attrgetter(names)(import_module(f"deformkit.compat.{host}"))


def find(parts: Sequence[Part], defined: Any) -> Part | None:
    """The part with the name and the module of the class or function ``defined``, if any."""
    name, module = str(getattr(defined, "__name__", "")), str(getattr(defined, "__module__", ""))
    for part in parts:
        if re.fullmatch(part.name, name) and re.fullmatch(part.module, module):
            return part
    return None


def _attend(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None = None,
    mode: Mode = "linear",
) -> Tensor:
    """:func:`deformkit.ms_deform_attn` for callers that keep locations in their model's dtype."""
    locations = sampling_locations.to(compute_dtype(value.dtype))
    weights = attention_weights.to(value.dtype).reshape(locations.shape[:-1])
    points = num_points
    if locations.dim() == 5 and num_points is None:
        points = [locations.shape[3] // len(spatial_shapes)] * len(spatial_shapes)
    return ms_deform_attn(value, spatial_shapes, locations, weights, num_points=points, mode=mode)


def _transformers_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    query = hidden_states if position_embeddings is None else hidden_states + position_embeddings
    locations = _locations(self, query, reference_points, spatial_shapes.flip(-1))

    padding = None if attention_mask is None else ~attention_mask
    value, weights = value_and_weights(self, query, encoder_hidden_states, padding)
    # The returned weights are those that are used, so that gradients can be taken by them.
    weights = weights.unflatten(-1, locations.shape[3:5])
    shapes = (spatial_shapes, spatial_shapes_list, level_start_index)
    output = self.attn(value, *shapes, locations, weights, self.im2col_step)
    return linear(self.output_proj, output), weights


def _transformers_pixel_decoder(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Tensor | None = None,
    output_attentions: bool = False,
    spatial_shapes: Any = None,
) -> tuple[Tensor, Tensor]:
    # Earlier releases pass the tensor alone.
    sizes = spatial_shapes.tolist() if spatial_shapes_list is None else spatial_shapes_list
    query = self.with_pos_embed(hidden_states, position_embeddings)
    extents = torch.tensor([[width, height] for height, width in sizes], device=query.device)
    locations = _locations(self, query, reference_points, extents)

    # The mask of these models is True where the others' is False.
    value, weights = value_and_weights(self, query, encoder_hidden_states, attention_mask)
    weights = weights.unflatten(-1, locations.shape[3:5])
    return linear(self.output_proj, _attend(value, sizes, locations, weights)), weights


def _locations(self: Any, query: Tensor, reference_points: Tensor, extents: Tensor) -> Tensor:
    """``[B, Q, H, L, P, 2]``; ``extents [L, 2]`` are (width, height)."""
    if reference_points.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference_points has shape {list(reference_points.shape)}; its last axis must be 2, or 4 for boxes"
        )
    offsets = linear(self.sampling_offsets, query).unflatten(-1, (self.n_heads, -1, 2))
    locations = point_locations(offsets, reference_points, extents, [self.n_points] * self.n_levels)
    return locations.unflatten(3, (self.n_levels, self.n_points))


def transformers_layer(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[Sequence[int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    return _attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def multi_scale_deformable_attention(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The function of transformers and of ultralytics, which has the same number of points on every level."""
    return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)


class _ChannelsFirstGradient(torch.autograd.Function):
    """The same values, with a gradient that lies in memory as the host's does: positions last.

    On a CPU the backward of torch's batch norm reads a gradient of one image with channels last as if it lay otherwise,
    and is wrong without a word. In D-FINE and DEIMv2 no linear layer stands between the attention and a batch norm.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """The function of RT-DETRv2, D-FINE and DEIMv2 in transformers."""
    if value.shape[0] == 1 and value.device.type == "cpu" and not torch.compiler.is_compiling():
        value = _ChannelsFirstGradient.apply(value)
    return _attend(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, _METHODS[method]
    )


def _rfdetr_attention(
    value: Tensor,
    value_spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    # Its value is [B, H, D, S].
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    return _attend(value.permute(0, 3, 1, 2), shapes, sampling_locations, attention_weights)


def _mmcv_roi_layer(self: Any, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
    return deform_roi_pool(
        input,
        rois.to(compute_dtype(input.dtype)),
        offset,
        output_size=self.output_size,
        spatial_scale=self.spatial_scale,
        sampling_ratio=self.sampling_ratio,
        gamma=self.gamma,
    )


def _native_warp(layer: Any) -> bool:
    """Whether MONAI computes the layer in torch: its compiled part, if it is there, gets numbers and differs."""
    return layer._interp_mode in ("bilinear", "nearest") and isinstance(layer._padding_mode, str)


_TRANSFORMERS = r"transformers\.models\..*"
_TORCHVISION = r"torchvision\.ops\.deform_conv"
_MMCV = r"mmcv\.ops\..*"
_DEFORMABLE_ATTENTION = "deformable_attention:DeformableAttention2D.forward"
_VOXELMORPH = r"voxelmorph\.nn\.modules"
_DETR = r"(.*\.)?ms_deform_attn_func"
_DETR_FUNCTION = "deformable_detr:ms_deform_attn_core_pytorch"
_DETR_APPLY = "deformable_detr:MSDeformAttnFunction.apply"

# Models whose layer has the arguments and the formula of Deformable DETR's, including the mask.
_DETR_LIKE = (
    r"transformers\.models\.(deformable_detr|rt_detr|rf_detr|lw_detr|grounding_dino|mm_grounding_dino|omdet_turbo"
    r"|pp_doclayout_v[234])\..*"
)
_PIXEL_DECODERS = r"transformers\.models\.(mask2former|oneformer)\..*"

LAYERS = (
    Part(_DETR_LIKE, r"\w+MultiscaleDeformableAttention", _transformers_attention, "nn.MSDeformAttn", "attn"),
    Part(_PIXEL_DECODERS, r"\w+MultiscaleDeformableAttention", _transformers_pixel_decoder, "nn.MSDeformAttn"),
    Part(_TRANSFORMERS, "MultiScaleDeformableAttention", transformers_layer, "ms_deform_attn"),
    Part(_TORCHVISION, "DeformConv2d", "torchvision:DeformConv2d.forward", "deform_conv2d"),
    Part(_MMCV, "DeformConv2d", "mmcv:DeformConv2d.forward", "deform_conv2d"),
    Part(_MMCV, "DeformConv2dPack", "mmcv:DeformConv2dPack.forward", "deform_conv2d"),
    Part(_MMCV, "ModulatedDeformConv2d", "mmcv:ModulatedDeformConv2d.forward", "deform_conv2d"),
    Part(_MMCV, "ModulatedDeformConv2dPack", "mmcv:ModulatedDeformConv2dPack.forward", "deform_conv2d"),
    Part(_MMCV, "DeformRoIPool", _mmcv_roi_layer, "deform_roi_pool"),
    Part(r"deformable_attention\..*", "DeformableAttention[12]D", _DEFORMABLE_ATTENTION, "deform_sample"),
    Part(r"monai\.networks\.blocks\.warp", "Warp", "monai:Warp.forward", "deform_sample", only=_native_warp),
    Part(_VOXELMORPH, "SpatialTransformer", "voxelmorph:SpatialTransformer.forward", "deform_sample"),
)
"""Layers, which are replaced one by one in the given model alone."""

FUNCTIONS = (
    Part(_TRANSFORMERS, "multi_scale_deformable_attention", multi_scale_deformable_attention, "ms_deform_attn"),
    Part(_TRANSFORMERS, "multi_scale_deformable_attention_v2", multi_scale_deformable_attention_v2, "ms_deform_attn"),
    Part(_TORCHVISION, "deform_conv2d", "torchvision:deform_conv2d", "deform_conv2d"),
    Part(
        r"ultralytics\.nn\.modules\.utils",
        "multi_scale_deformable_attn_pytorch",
        multi_scale_deformable_attention,
        "ms_deform_attn",
    ),
    Part(r"rfdetr\..*ms_deform_attn_func", "ms_deform_attn_core_pytorch", _rfdetr_attention, "ms_deform_attn"),
    Part(_MMCV, "DeformConv2dFunction", "mmcv:deform_conv2d", "deform_conv2d"),
    Part(_MMCV, "ModulatedDeformConv2dFunction", "mmcv:modulated_deform_conv2d", "deform_conv2d"),
    Part(_MMCV, "DeformRoIPoolFunction", "mmcv:deform_roi_pool", "deform_roi_pool"),
    Part(_MMCV, "multi_scale_deformable_attn_pytorch", _DETR_FUNCTION, "ms_deform_attn"),
    Part(_MMCV, "MultiScaleDeformableAttnFunction", _DETR_APPLY, "ms_deform_attn"),
    Part(_DETR, "ms_deform_attn_core_pytorch", _DETR_FUNCTION, "ms_deform_attn"),
    Part(_DETR, "MSDeformAttnFunction", _DETR_APPLY, "ms_deform_attn"),
)
"""Functions, which are replaced as attributes of modules, or in the namespace in which the code looks them up."""
