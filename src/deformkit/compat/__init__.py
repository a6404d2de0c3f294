"""Names, signatures and semantics of host libraries, over the operators and layers of deformkit.

A program changes one import and keeps its calls and its checkpoints::

    from torchvision.ops import DeformConv2d              # before
    from deformkit.compat.torchvision import DeformConv2d  # after

A host is imported when it is first asked for, and never needs the library that it stands in for.
"""

from importlib import import_module
from types import ModuleType

from ._grid_sample import grid_sample
from ._install import install, uninstall

__all__ = [
    "convert",
    "dc1d",
    "deformable_attention",
    "deformable_detr",
    "deformops",
    "grid_sample",
    "install",
    "mmcv",
    "monai",
    "torchvision",
    "tvdcn",
    "uninstall",
    "voxelmorph",
]

_MODULES = (
    "convert",
    "dc1d",
    "deformable_attention",
    "deformable_detr",
    "deformops",
    "mmcv",
    "monai",
    "torchvision",
    "tvdcn",
    "voxelmorph",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
