"""Helpers of the tests of patch."""

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

SHAPES = [(6, 5), (3, 4)]


class Ours(TorchDispatchMode):
    """Counts the calls of the operators of deformkit."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deformkit":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def ours(call: Callable[[], Any]) -> Counter[str]:
    with torch.no_grad(), Ours() as counted:
        call()
    return counted.calls


def doubled(value: Any) -> Any:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def tensors(output: Any) -> dict[str, Tensor]:
    leaves = {name + keystr(path): v for name, value in output.items() for path, v in tree_flatten_with_path(value)[0]}
    return {name: v for name, v in leaves.items() if isinstance(v, Tensor) and v.is_floating_point()}


def attention(model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small layer, and arguments for it."""
    transformers = pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    width, heads, levels = 16, 2, 2
    if model_type == "deformable_detr":
        config = transformers.DeformableDetrConfig(d_model=width, num_feature_levels=levels)
        layer = module.DeformableDetrMultiscaleDeformableAttention(config, num_heads=heads, n_points=3)
    elif model_type == "mask2former":
        layer = module.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(width, heads, levels, 3)
    else:
        sizes = {"d_model": width, "decoder_attention_heads": heads, "decoder_n_levels": levels, "decoder_n_points": 3}
        if model_type == "rt_detr_v2":
            layer = module.RTDetrV2MultiscaleDeformableAttention(transformers.RTDetrV2Config(**sizes))
        else:
            sizes |= {"decoder_n_points": [3, 2], "num_feature_levels": levels}
            layer = module.DFineMultiscaleDeformableAttention(transformers.DFineConfig(**sizes))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments = {
        "hidden_states": torch.randn(2, 7, width),
        "encoder_hidden_states": torch.randn(2, 42, width),
        "reference_points": torch.rand(2, 7, 1 if "_" in model_type and model_type != "deformable_detr" else levels, 4),
        "spatial_shapes_list": SHAPES,
    }
    if model_type == "mask2former":
        arguments["reference_points"] = torch.rand(2, 7, levels, 4)
    else:
        arguments["spatial_shapes"] = torch.tensor(SHAPES)
    if model_type == "deformable_detr":
        arguments["level_start_index"] = torch.tensor([0, 30])
    return layer, arguments


LAYERS = ["deformable_detr", "mask2former", "rt_detr_v2", "d_fine"]
