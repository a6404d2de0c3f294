"""Deformable aggregation on tensors as the published DCNv3 and DCNv4 lay them out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...nn._convert import _transposed_taps
from ...ops import deform_aggregate
from ...ops._shape import check_floating, code_of
from .._gradient import checked_gradient

Unpack = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Window(NamedTuple):
    """The numbers of one call, by pairs along h and w."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    group: int
    group_channels: int
    offset_scale: float
    remove_center: bool

    @classmethod
    def of(
        cls, numbers: Sequence[int], group: int, group_channels: int, offset_scale: float, remove_center: int
    ) -> "Window":
        """From the eight numbers that the hosts give one by one: kernel, stride, padding and dilation along h, w."""
        kernel_size, stride, padding, dilation = (list(numbers[i : i + 2]) for i in range(0, 8, 2))
        rest = (group, group_channels, float(offset_scale), bool(remove_center))
        return cls(kernel_size, stride, padding, dilation, *rest)

    @property
    def taps(self) -> Tensor:
        """For each of our taps, row after row, its number among those published, column after column."""
        return _transposed_taps(self.kernel_size, self.remove_center)

    def heads(self, input: Tensor) -> Tensor:
        """``input [N, H, W, G*C]`` as ``[N, H, W, G, C]``."""
        check_floating("input", input)
        if input.dim() != 4 or input.shape[-1] != self.group * self.group_channels:
            raise ValueError(
                f"input has shape {list(input.shape)}; with group={self.group} and group_channels="
                f"{self.group_channels} it must be [N, H, W, {self.group * self.group_channels}]"
            )
        return input.unflatten(-1, (self.group, self.group_channels))

    def aggregate(self, value: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        """The output ``[N, Hout, Wout, G*C]`` for tensors in our layout."""
        options = {"offset_scale": self.offset_scale, "remove_center": self.remove_center}
        return deform_aggregate(value, offset, weight, *self[:4], **options).flatten(-2)  # type: ignore[arg-type]


def check_packed(name: str, packed: Tensor, channels: int, multiple_of: int = 1) -> None:
    """Raise unless ``packed`` is a map with so many channels, rounded up."""
    check_floating(name, packed)
    channels = -(-channels // multiple_of) * multiple_of
    if packed.dim() != 4 or packed.shape[-1] != channels:
        raise ValueError(f"{name} has shape {list(packed.shape)}; it must be [N, Hout, Wout, {channels}]")


def in_our_order(window: Window, offset: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets ``[..., G, K, 2]`` and weights ``[..., G, K]``: taps row after row, and (h, w) for (x, y)."""
    taps = window.taps.to(offset.device)
    return offset[..., taps, :].flip(-1), weight[..., taps]


def backward(window: Window, unpack: Unpack, tensors: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The gradients by ``tensors``, in the published layout, which ``unpack`` turns into ours."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        ours = unpack(*leaves)
    grad_output = checked_gradient(window.aggregate, ours, grad_output)
    grads = torch.ops.deformkit.deform_aggregate_backward(
        grad_output.unflatten(-1, (window.group, window.group_channels)),
        *(tensor.detach() for tensor in ours),
        *window[:4],
        window.offset_scale,
        window.remove_center,
        code_of("boundary", "zeros"),
        [True, True, True],
    )
    return list(torch.autograd.grad(ours, leaves, grads))
