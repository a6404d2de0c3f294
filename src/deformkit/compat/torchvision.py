"""``torchvision.ops``: deformable convolution of images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]  # it is there, and documented

from .. import nn
from ..ops import deform_conv2d as _deform_conv2d
from ..ops._shape import check_tensor, ntuple, prod
from ._autocast import autocasting, without_autocast

__all__ = ["DeformConv2d", "deform_conv2d"]


class ArgumentTypeError(TypeError, RuntimeError):
    """A TypeError, and the RuntimeError that torchvision raises in its place."""


class ArgumentValueError(ValueError, RuntimeError):
    """A ValueError, and the RuntimeError that torchvision raises in its place."""


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | list[int] | tuple[int, int] = (1, 1),
    padding: int | list[int] | tuple[int, int] = (0, 0),
    dilation: int | list[int] | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, as ``torchvision.ops.deform_conv2d``; see :func:`deformkit.deform_conv2d`.

    It supports ``torch.jit.script`` and ``torch.jit.trace``. Under autocast it computes in float32, as torchvision
    does.

    Args:
        input: ``[B, C, H, W]``.
        offset: ``[B, og*kh*kw*2, Hout, Wout]`` in pixels, for each tap the shift along h, then along w.
        weight: ``[Cout, C/groups, kh, kw]``.
        bias: ``[Cout]`` or None.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels.
        dilation: distance between two taps, in pixels.
        mask: ``[B, og*kh*kw, Hout, Wout]`` factors of the taps, or None.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``input``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype. It is also a RuntimeError, as in torchvision.
        ValueError: a shape, device or size does not fit; the message names it. It is also a RuntimeError.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 8, 3, 3)
        >>> deform_conv2d(input, torch.zeros(2, 18, 20, 30), weight, padding=1).shape
        torch.Size([2, 16, 20, 30])
    """
    if is_scripting():
        steps = (_pair(stride), _pair(padding), _pair(dilation))
        return torch.ops.deformkit.deform_conv(input, offset, weight, bias, steps[0], steps[1], steps[2], mask, 0)
    else:
        return _as_torchvision(input, offset, weight, bias, stride, padding, dilation, mask)


def _pair(value: int | list[int] | tuple[int, int]) -> list[int]:
    """As a list of two, in words that TorchScript knows."""
    if isinstance(value, int):
        return [value, value]
    elif isinstance(value, list):
        return value
    else:
        return [value[0], value[1]]


def _as_torchvision(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, *steps: int | Sequence[int] | Tensor | None
) -> Tensor:
    """:func:`deformkit.deform_conv2d` with the errors, and under autocast the dtypes, of torchvision."""
    arguments: list[Any] = [input, offset, weight, bias, *steps]
    try:
        check_tensor("input", input)
        if not autocasting(input):
            return _deform_conv2d(*arguments)
        with without_autocast(input):
            halves = (torch.float16, torch.bfloat16)
            wide: list[Any] = [a.float() if isinstance(a, Tensor) and a.dtype in halves else a for a in arguments]
            return _deform_conv2d(*wide).to(input.dtype)
    except TypeError as error:
        raise ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise ArgumentValueError(str(error)) from error


# torch.fx keeps a call as one node. It traces into the layer, which is none of those that torchvision knows as leaves.
torch.fx.wrap("deform_conv2d")


class DeformConv2d(nn.DeformConv2d):
    """The layer ``torchvision.ops.DeformConv2d``: :class:`deformkit.nn.DeformConv2d` with any number of offset groups.

    The arguments, the initialisation and the state-dict are torchvision's. The number of offset groups is
    derived from the offsets at each call, as in torchvision.

    Args:
        in_channels: C, channels of the input.
        out_channels: Cout, channels of the output.
        kernel_size: number of taps along each axis.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels.
        dilation: distance between two taps, in pixels.
        groups: number of groups of channels that are convolved separately.
        bias: whether to add a learnable bias.

    Shapes of ``forward(input, offset, mask=None)``: as those of :func:`deform_conv2d`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformConv2d(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 8, 20, 30), torch.zeros(2, 36, 20, 30), torch.ones(2, 18, 20, 30)).shape
        torch.Size([2, 16, 20, 30])
    """

    # What TorchScript reads of the class, and the numbers as it knows them.
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        window = (kernel_size, stride, ntuple(padding, 2, "padding", 0), dilation)
        super().__init__(in_channels, out_channels, *window, groups, bias)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve ``input`` at points that ``offset`` moves, with each tap multiplied by ``mask``."""
        # The operator derives the number of groups from the shapes and would accept another one.
        if isinstance(input, Tensor) and input.dim() == 4 and input.shape[1] != self.in_channels:
            raise ArgumentValueError(
                f"input has {input.shape[1]} channels; this layer has in_channels={self.in_channels}"
            )
        steps = (self.stride, self.padding, self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, steps[0], steps[1], steps[2], mask)

    def sampling_locations(self, offset: Tensor) -> Tensor:
        """As :meth:`deformkit.nn.DeformConv2d.sampling_locations`, for the offset groups that ``offset`` has."""
        check_tensor("offset", offset)
        parts = offset.split(2 * prod(self.kernel_size), -3) if offset.dim() in (3, 4) else [offset]
        return torch.cat([super(DeformConv2d, self).sampling_locations(part) for part in parts], -5)
