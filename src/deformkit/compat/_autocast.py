"""Code for hosts whose functions autocast does not affect."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off for the device of ``tensor``, so that operators compute in the dtypes that they are given."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasting(tensor) else nullcontext()
