"""Deformable operators for PyTorch in one, two and three dimensions."""

import sys as _sys
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

__version__ = "0.1.0"

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError):
    # The command `deformkit doctor` says what is wrong with torch, and imports this package first.
    if _Path((_sys.argv or [""])[0]).stem not in ("-m", "deformkit"):
        raise
else:
    from . import _kernels as _kernels
    from . import nn as nn
    from . import reference as reference
    from ._kernels import library_path as library_path
    from ._monitor import monitor as monitor
    from ._on_import import on_import as _on_import
    from ._param_groups import param_groups as param_groups
    from ._patching import patch as patch
    from ._patching import unpatch as unpatch
    from ._verify import verify as verify
    from .ops import deform_aggregate as deform_aggregate
    from .ops import deform_conv1d as deform_conv1d
    from .ops import deform_conv2d as deform_conv2d
    from .ops import deform_conv3d as deform_conv3d
    from .ops import deform_conv_transpose1d as deform_conv_transpose1d
    from .ops import deform_conv_transpose2d as deform_conv_transpose2d
    from .ops import deform_conv_transpose3d as deform_conv_transpose3d
    from .ops import deform_correlate as deform_correlate
    from .ops import deform_roi_pool as deform_roi_pool
    from .ops import deform_sample as deform_sample
    from .ops import deform_splat as deform_splat
    from .ops import ms_deform_attn as ms_deform_attn

    def _register_sharding() -> None:
        """DTensor's rules for the operators; a release of torch without what they need leaves it as it is."""
        try:
            from importlib import import_module

            import_module(f"{__name__}.distributed")
        except (ImportError, AttributeError, TypeError) as error:
            from warnings import warn

            warn(f"deformkit has no sharding rules for this release of torch: {error}", RuntimeWarning, stacklevel=2)

    def _register_operations() -> None:
        """The formulas for torch's counter of operations."""
        from ._operations import register

        register()

    _on_import("torch.distributed.tensor", _register_sharding)
    _on_import("torch.utils.flop_counter", _register_operations)


def __getattr__(name: str) -> _ModuleType:
    # compat stands in for whole libraries, viz draws, distributed imports DTensor, others serve other libraries:
    # imported when first asked for.
    if name in ("compat", "distributed", "export", "hf", "onnx", "openvino", "viz"):
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    is_layer = callable(getattr(globals().get("nn"), name, None))
    hint = f"; it is {__name__}.nn.{name}" if is_layer else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
