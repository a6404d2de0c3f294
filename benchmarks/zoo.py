"""Models of transformers with deformable attention and random weights; nothing is downloaded."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

MODELS = {
    "deformable_detr": ("DeformableDetrConfig", "DeformableDetrForObjectDetection"),
    "rt_detr": ("RTDetrConfig", "RTDetrForObjectDetection"),
    "rt_detr_v2": ("RTDetrV2Config", "RTDetrV2ForObjectDetection"),
    "d_fine": ("DFineConfig", "DFineForObjectDetection"),
    "deimv2": ("Deimv2Config", "Deimv2ForObjectDetection"),
    "pp_doclayout_v3": ("PPDocLayoutV3Config", "PPDocLayoutV3ForObjectDetection"),
    "mask2former": ("Mask2FormerConfig", "Mask2FormerForUniversalSegmentation"),
    "oneformer": ("OneFormerConfig", "OneFormerForUniversalSegmentation"),
    "grounding_dino": ("GroundingDinoConfig", "GroundingDinoForObjectDetection"),
    "mm_grounding_dino": ("MMGroundingDinoConfig", "MMGroundingDinoForObjectDetection"),
}


def build(name: str, **options: Any) -> nn.Module:
    """The model by the name of its folder in transformers, with the default configuration except for ``options``."""
    transformers = importlib.import_module("transformers")
    config_name, model_name = MODELS[name]
    if name == "deformable_detr":
        # Its default backbone would be downloaded.
        backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
        options = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone, **options}
    config = getattr(transformers, config_name)(**options)
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    # A new model samples at whole pixels from its reference points: on grid lines, rounding decides the derivative.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter += 0.02 * torch.randn_like(parameter)
            if key.endswith("sampling_offsets.bias"):
                parameter += 0.3 * torch.rand_like(parameter)
    return model


def inputs(name: str, size: int, batch: int = 1) -> dict[str, Tensor]:
    """Keyword arguments for a call with square images of ``size`` pixels."""
    # Some images have nearly equal proposals, among which rounding decides, also in the original model.
    generator = torch.Generator().manual_seed(1)
    arguments = {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}
    if "grounding" in name:
        # [CLS], one word, a full stop, [SEP]
        arguments["input_ids"] = torch.tensor([[101, 4937, 1012, 102]]).repeat(batch, 1)
    if name == "oneformer":
        arguments["task_inputs"] = torch.randint(0, 100, (batch, 77), generator=generator.manual_seed(0))
    return arguments
