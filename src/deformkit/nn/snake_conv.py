"""Dynamic snake convolution: a line of taps that bends, each tap moved from its neighbour."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops._shape import check_count, check_floating, compute_dtype
from ._public import OwnNames
from .deform_conv import DeformConv2d, DeformConv3d

_CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_DEFORM_CONVS: dict[int, Any] = {2: DeformConv2d, 3: DeformConv3d}


class _SnakeConv(OwnNames, nn.Module):
    spatial_dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 9,
        axis: int = -1,
        max_step: float = 1.0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        axes = self.spatial_dims
        check_count("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd, so that a tap is at the centre")
        if not -axes <= axis < axes:
            raise ValueError(f"axis is {axis}; it must be in -{axes} to {axes - 1}")
        if not max_step > 0:
            raise ValueError(f"max_step is {max_step}; it must be positive")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.axis, self.max_step = axis % axes, max_step
        kernel = [kernel_size if n == self.axis else 1 for n in range(axes)]
        padding = [k // 2 for k in kernel]
        rest: dict[str, Any] = {"groups": groups, "bias": bias, "boundary": "border"}
        self.conv = _DEFORM_CONVS[axes](in_channels, out_channels, kernel, padding=padding, **rest)
        self.offset_head = _CONVS[axes](in_channels, (axes - 1) * kernel_size, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the line start straight."""
        for parameter in self.offset_head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` along the line that the layer predicts from it."""
        return self.conv(input, self.predict(input))

    def predict(self, input: Tensor) -> Tensor:
        """The offsets of the taps in pixels, ``[B, K*N, *S]`` as :func:`deformkit.deform_conv2d` takes them."""
        check_floating("input", input)
        if input.dim() != self.spatial_dims + 2 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"input has shape {list(input.shape)}; it must have {self.spatial_dims + 2} axes and "
                f"{self.in_channels} channels"
            )
        # A step of each tap from its neighbour nearer to the centre, added up outwards; half precision cannot.
        raw = self.offset_head(input)
        step = self.max_step * raw.to(compute_dtype(raw.dtype)).tanh().unflatten(1, (-1, self.kernel_size))
        middle = self.kernel_size // 2
        before, after = step[:, :, :middle], step[:, :, middle + 1 :]
        before = before.flip(2).cumsum(2).flip(2)
        across = torch.cat([before, torch.zeros_like(step[:, :, :1]), after.cumsum(2)], 2)
        moved = list(across.unbind(1))
        moved.insert(self.axis, torch.zeros_like(moved[0]))
        return torch.stack(moved, 2).flatten(1, 2)

    def extra_repr(self) -> str:
        """The arguments of the constructor that the convolution does not show."""
        return f"kernel_size={self.kernel_size}, axis={self.axis}, max_step={self.max_step}"


class SnakeConv2d(_SnakeConv):
    """Dynamic snake convolution of an image: K taps in a line along one axis, which bends across it.

    ``output[b, f, o] = bias[f] + sum over c, k of weight[f, c, k] * sample(input[b, c], o + (k - m) * e + s[b, k, o])``

    where ``e`` is one pixel along ``axis``, ``m = K // 2`` is the tap at the centre, and the shift ``s`` across the
    axis is 0 for it and ``s[k] = s[k -+ 1] + max_step * tanh(offset_head(input)[k])`` outwards, so that the line stays
    connected. Points are clamped into the input. A new layer has a straight line. The convolution is
    :class:`DeformConv2d` with a kernel of ``(1, K)`` or ``(K, 1)``; no samples of all taps are kept. The paper uses one
    layer for each axis beside a plain convolution, and concatenates their outputs.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: K, odd.
        axis: the spatial axis along which the taps lie: 0 for h, 1 or -1 for w.
        max_step: largest step across between neighbouring taps, in pixels.
        groups: number of groups of channels that are convolved separately.
        bias: whether to add a learnable bias.

    Shapes: ``input [B, C, H, W]``, output ``[B, Cout, H, W]``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> SnakeConv2d(8, 16, 9, axis=0)(torch.randn(1, 8, 20, 24)).shape
        torch.Size([1, 16, 20, 24])

    Paper: Dynamic Snake Convolution based on Topological Geometric Constraints, https://arxiv.org/abs/2307.08388.
    """

    spatial_dims = 2


class SnakeConv3d(_SnakeConv):
    """Dynamic snake convolution of a volume, :class:`SnakeConv2d` whose line bends across both other axes.

    Shapes: ``input [B, C, D, H, W]``, output ``[B, Cout, D, H, W]``. ``axis`` is 0 for d, 1 for h and 2 or -1 for w.

    Example:
        >>> import torch
        >>> SnakeConv3d(2, 4, 5)(torch.randn(1, 2, 6, 7, 8)).shape
        torch.Size([1, 4, 6, 7, 8])
    """

    spatial_dims = 3
