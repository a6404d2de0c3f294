"""The public function ``param_groups``."""

from typing import Any

from torch import nn

from .nn import DCNv3, DCNv4, PackedDeformRoIPool
from .nn.deform_conv import _PackedDeformConv

# The parts of a layer that predict its offsets. Names that need no class are those of Deformable DETR and of mmcv.
_OF_CLASS: dict[type[nn.Module], str] = {
    DCNv3: "offset",
    DCNv4: "offset_mask",
    PackedDeformRoIPool: "offset_fc",
    _PackedDeformConv: "offset_head",
}
_OF_ANY = ("sampling_offsets", "conv_offset", "offset_head")


def param_groups(model: nn.Module, lr: float, offset_lr_mult: float = 0.1) -> list[dict[str, Any]]:
    """Divide the parameters of a model into two groups for an optimiser: those that predict offsets, and all others.

    The parameters that predict offsets are those of ``offset_head`` of packed convolutions, of ``sampling_offsets`` of
    multi-scale deformable attention (ours and that of Deformable DETR and its descendants), of ``offset`` of
    :class:`deformkit.nn.DCNv3`, of ``offset_mask`` of :class:`deformkit.nn.DCNv4`, of ``offset_fc`` of
    :class:`deformkit.nn.PackedDeformRoIPool` and of ``conv_offset`` of mmcv. Where one part predicts offsets and mask
    together, the mask learns at the rate of the offsets.

    Args:
        model: the module to train. Parameters that require no gradient are left out.
        lr: the learning rate of all other parameters, greater than 0.
        offset_lr_mult: the learning rate of the parameters that predict offsets, divided by ``lr``; at least 0.

    Returns:
        Two dicts with the keys ``"params"`` and ``"lr"``: all other parameters, then those that predict offsets.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a number is out of range, or no layer of the model predicts offsets.

    Example:
        >>> import torch
        >>> from deformkit.nn import PackedDeformConv2d
        >>> model = torch.nn.Sequential(PackedDeformConv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(4, 0.001), (2, 0.0001)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if not lr > 0:
        raise ValueError(f"lr is {lr}; it must be greater than 0")
    if not offset_lr_mult >= 0:
        raise ValueError(f"offset_lr_mult is {offset_lr_mult}; it must be at least 0")
    heads = [head for module in model.modules() for head in _heads(module)]
    chosen = {id(parameter) for head in heads for parameter in head.parameters()}
    if not chosen:
        raise ValueError(
            "model has no layer that predicts offsets. Layers such as DeformConv2d are given their offsets; make a "
            "group for the parameters of the module that predicts them"
        )
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learned if id(p) not in chosen], "lr": lr},
        {"params": [p for p in learned if id(p) in chosen], "lr": lr * offset_lr_mult},
    ]


def _heads(module: nn.Module) -> list[nn.Module]:
    """The parts of ``module``, itself not included, that predict its offsets."""
    names = {name for cls, name in _OF_CLASS.items() if isinstance(module, cls)} | set(_OF_ANY)
    return [child for name, child in module.named_children() if name in names]
