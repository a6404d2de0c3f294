"""Linear layers on a CPU, through the faster of the matrix products that torch has."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

# With fewer multiplications than this, the product takes less time than the code around it.
_MANY_PRODUCTS = 2**23

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def linear(layer: nn.Module, input: Tensor) -> Tensor:
    """``layer(input)``, where ``layer`` is a ``Linear`` or a module that replaces it.

    If torch was built with MKL, it uses MKL for float32 matrix products and oneDNN for convolutions, and oneDNN can be
    much faster. A ``Linear`` is therefore computed as the equivalent convolution with a kernel of one element, over a
    single row of pixels with channels last.
    """
    if not _convolves(layer, input):
        return layer(input)
    assert isinstance(layer, nn.Linear)
    row = input.reshape(1, 1, -1, layer.in_features).permute(0, 3, 1, 2)
    output = F.conv2d(row, layer.weight[:, :, None, None], layer.bias)
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], layer.out_features)


def _convolves(layer: Any, input: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(layer) is not nn.Linear or type(input) is not Tensor:
        return False
    if input.numel() * layer.out_features < _MANY_PRODUCTS:
        return False
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and backends.mkldnn.enabled):
        return False
    if "forward" in vars(layer) or _has_any_global_hook() or any(getattr(layer, name) for name in _HOOKS):
        return False
    # A weight of another class, such as a quantised one, may support matrix products alone.
    return (
        type(layer.weight) in (Tensor, nn.Parameter)
        and input.device.type == layer.weight.device.type == "cpu"
        and input.dtype == layer.weight.dtype == torch.float32
        and input.shape[-1:] == layer.weight.shape[1:]
        and not torch.is_autocast_enabled("cpu")
    )
