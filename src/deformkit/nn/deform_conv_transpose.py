"""Layers of the transposed deformable convolution: offsets given, or predicted by the layer itself ("packed")."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..ops._shape import Boundary, check_alike, check_choice, check_floating, ntuple
from ..ops.deform_conv_transpose.op import (
    deform_conv_transpose1d,
    deform_conv_transpose2d,
    deform_conv_transpose3d,
)
from ._deformable import Deformable, check_channels

_FUNCTIONS = {1: deform_conv_transpose1d, 2: deform_conv_transpose2d, 3: deform_conv_transpose3d}
_PLAIN: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _DeformConvTranspose(Deformable, _ConvTransposeNd):
    """The base of all layers: the parameters of :class:`torch.nn.ConvTransposeNd` and the call of the operator."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset_groups: int = 1,
        boundary: Boundary = "zeros",
    ) -> None:
        axes = self.spatial_dims
        kernel, strides, paddings, extras, dilations = (
            tuple(ntuple(value, axes, name, least))
            for name, value, least in (
                ("kernel_size", kernel_size, 1),
                ("stride", stride, 1),
                ("padding", padding, 0),
                ("output_padding", output_padding, 0),
                ("dilation", dilation, 1),
            )
        )
        check_choice("padding_mode", padding_mode, ("zeros",))
        check_choice("boundary", boundary, ("zeros", "border"))
        check_channels(in_channels, out_channels, groups, offset_groups, of="out_channels")
        window = (kernel, strides, paddings, dilations)
        rest = (True, extras, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *window, *rest)  # type: ignore[arg-type]
        self.offset_groups = offset_groups
        self.boundary = boundary

    def _deform(self, input: Tensor, offset: Tensor, mask: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        axes = self.spatial_dims
        if self._is_unbatched(input, offset, mask):
            size = None if output_size is None else list(output_size)[-axes:]
            maps = (input.unsqueeze(0), offset.unsqueeze(0), None if mask is None else mask.unsqueeze(0))
            return self._deform(*maps, size).squeeze(0)
        window: Any = (self.stride, self.padding, self.kernel_size, axes, self.dilation)
        extra = self._output_padding(input, None if output_size is None else list(output_size), *window)
        steps: Any = (self.stride, self.padding, extra, self.groups, self.dilation)
        function: Any = _FUNCTIONS[axes]
        return function(input, offset, self.weight, self.bias, *steps, mask, boundary=self.boundary)


class _GivenDeformConvTranspose(_DeformConvTranspose):
    def forward(
        self,
        input: Tensor,
        offset: Tensor,
        mask: Tensor | None = None,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Add every tap, multiplied by ``mask``, to the output at the point where ``offset`` moves it."""
        return self._deform(input, offset, mask, output_size)


class DeformConvTranspose1d(_GivenDeformConvTranspose):
    """Transposed deformable convolution of a sequence; :class:`DeformConvTranspose2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, ``offset [B, og*K, L]``, ``mask [B, og*K, L]``.

    Example:
        >>> layer = DeformConvTranspose1d(8, 16, 4, stride=2, padding=1)
        >>> layer(torch.randn(2, 8, 50), torch.zeros(2, 4, 50)).shape
        torch.Size([2, 16, 100])
    """

    spatial_dims = 1


class DeformConvTranspose2d(_GivenDeformConvTranspose):
    """Transposed deformable convolution of an image; ``forward`` takes the offsets and optionally a mask.

    See :func:`deformkit.deform_conv_transpose2d` for the formula. With zero offsets and no mask this is
    :class:`torch.nn.ConvTranspose2d`. It has the same arguments, parameters, initialisation and state-dict.

    Args:
        in_channels: C, channels of the input.
        out_channels: Cout, channels of the output.
        kernel_size: number of taps along each axis; K in total.
        stride: distance in the output between two positions of the input, in pixels.
        padding: how many rows and columns the output loses at each edge, in pixels.
        output_padding: how many rows and columns the output gains at the end of each axis, in pixels; less than the
            stride or the dilation.
        groups: number of groups of channels that are convolved separately.
        bias: whether to add a learnable bias.
        dilation: distance between two taps, in pixels.
        padding_mode: ``"zeros"``, as in torch.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        offset_groups: og, the number of groups of output channels that share their offsets and masks.
        boundary: ``"zeros"``: what falls outside the output is lost. ``"border"``: points are clamped into the output.

    Shapes of ``forward(input, offset, mask=None, output_size=None)``, with or without the batch axis:
        ``input [B, C, H, W]``; ``offset [B, og*K*2, H, W]`` in pixels of the output, for each offset group the taps in
        row-major order, for each tap the shift along h, then along w; ``mask [B, og*K, H, W]``; output
        ``[B, Cout, Hout, Wout]``. ``output_size``, if given, replaces ``output_padding``, as in torch.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = DeformConvTranspose2d(8, 16, 4, stride=2, padding=1)
        >>> layer(torch.randn(2, 8, 20, 30), torch.zeros(2, 32, 20, 30)).shape
        torch.Size([2, 16, 40, 60])

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """

    spatial_dims = 2


class DeformConvTranspose3d(_GivenDeformConvTranspose):
    """Transposed deformable convolution of a volume; :class:`DeformConvTranspose2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, ``offset [B, og*K*3, D, H, W]`` (for each tap the shifts along d, h, w),
    ``mask [B, og*K, D, H, W]``.

    Example:
        >>> layer = DeformConvTranspose3d(4, 5, 2, stride=2)
        >>> layer(torch.randn(1, 4, 3, 4, 5), torch.zeros(1, 24, 3, 4, 5)).shape
        torch.Size([1, 5, 6, 8, 10])
    """

    spatial_dims = 3


class _PackedDeformConvTranspose(_DeformConvTranspose):
    modulated: bool
    offset_head: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        modulated: bool = False,
        offset_groups: int = 1,
        boundary: Boundary = "zeros",
    ) -> None:
        window = (kernel_size, stride, padding, output_padding)
        rest: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        rest |= {"groups": groups, "dilation": dilation, "offset_groups": offset_groups, "boundary": boundary}
        super().__init__(in_channels, out_channels, *window, **rest)
        self.modulated = modulated
        channels = self.offset_groups * prod(self.kernel_size)
        # Its values are set below. Drawing none keeps the random numbers those of a network of plain convolutions.
        self.offset_head = nn.utils.skip_init(
            _PLAIN[self.spatial_dims],
            self.in_channels,
            channels * (self.spatial_dims + modulated),
            3,
            padding=1,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self._reset_offset_head()

    def reset_parameters(self) -> None:
        """Initialise the weights as :class:`torch.nn.ConvTransposeNd` does and the offset head to zero."""
        super().reset_parameters()
        # The base class calls this before the head exists.
        if "offset_head" in self._modules:
            self._reset_offset_head()

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict the offsets ``[B, og*K*N, *in]`` in pixels, and the mask ``[B, og*K, *in]`` or None."""
        self._check_input(input)
        check_floating("input", input)
        check_alike("input", input, "weight", self.weight)
        head = self.offset_head(input)
        if not self.modulated:
            return head, None
        taps = self.offset_groups * prod(self.kernel_size)
        offset, logit = head.split([taps * self.spatial_dims, taps], dim=-self.spatial_dims - 1)
        return offset, 2 * logit.sigmoid()

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Add every tap to the output at the point that the layer predicts from ``input``."""
        offset, mask = self.predict(input)
        return self._deform(input, offset, mask, output_size)

    def extra_repr(self) -> str:
        """The arguments that the base class shows, and ``modulated``."""
        return super().extra_repr() + (", modulated=True" if self.modulated else "")

    def _reset_offset_head(self) -> None:
        for parameter in self.offset_head.parameters():
            nn.init.zeros_(parameter)


class PackedDeformConvTranspose1d(_PackedDeformConvTranspose):
    """Transposed deformable convolution of a sequence with predicted offsets; :class:`PackedDeformConvTranspose2d`.

    Shapes: ``input [B, C, L]``, output ``[B, Cout, Lout]``.

    Example:
        >>> layer = PackedDeformConvTranspose1d(8, 16, 4, stride=2, padding=1, modulated=True)
        >>> layer(torch.randn(2, 8, 50)).shape
        torch.Size([2, 16, 100])
    """

    spatial_dims = 1


class PackedDeformConvTranspose2d(_PackedDeformConvTranspose):
    """Transposed deformable convolution of an image that predicts its offsets, and its mask if ``modulated``.

    ``offset, logit = offset_head(input)``, ``mask = 2 * sigmoid(logit)``, then :class:`DeformConvTranspose2d`.

    ``offset_head`` is a plain convolution with a kernel of 3 elements along each axis, which keeps the size of the
    input. It is initialised to zero, so that offsets are 0 and masks are 1. A new layer therefore computes the same as
    :class:`torch.nn.ConvTranspose2d` with the same random seed, and can replace a trained one
    (``load_state_dict(..., strict=False)``). Offsets are learned in pixels of the output; if they grow too fast, use a
    smaller learning rate for ``offset_head``.

    Args:
        in_channels: channels of the input. Parameters not described here are as in :class:`DeformConvTranspose2d`.
        groups: number of groups of the layer; its offset head has one group, so that offsets depend on all channels.
        bias: whether the layer has a bias; its offset head always has one.
        modulated: whether to predict a mask too (version 2).

    Shapes of ``forward(input, output_size=None)``, with or without the batch axis: ``input [B, C, H, W]``, output
    ``[B, Cout, Hout, Wout]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = PackedDeformConvTranspose2d(8, 16, 4, stride=2, padding=1, modulated=True)
        >>> layer(torch.randn(2, 8, 20, 30)).shape
        torch.Size([2, 16, 40, 60])

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """

    spatial_dims = 2


class PackedDeformConvTranspose3d(_PackedDeformConvTranspose):
    """Transposed deformable convolution of a volume with predicted offsets; :class:`PackedDeformConvTranspose2d`.

    Shapes: ``input [B, C, D, H, W]``, output ``[B, Cout, Dout, Hout, Wout]``.

    Example:
        >>> layer = PackedDeformConvTranspose3d(4, 5, 2, stride=2)
        >>> layer(torch.randn(1, 4, 3, 4, 5)).shape
        torch.Size([1, 5, 6, 8, 10])
    """

    spatial_dims = 3
