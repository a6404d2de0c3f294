"""Layers of deformable convolution: offsets given, or predicted by the layer itself ("packed")."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..ops._shape import (
    CHOICES,
    Boundary,
    check_alike,
    check_choice,
    check_count,
    check_floating,
    check_tensor,
    compute_dtype,
    ntuple,
)
from ..ops.deform_conv.op import deform_conv1d, deform_conv2d, deform_conv3d
from ..ops.sample.reference import tap_grid
from ._deformable import Deformable, check_channels

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_FUNCTIONS = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}
_PLAIN: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _DeformConv(Deformable, _ConvNd):
    """The base of all layers: the parameters of :class:`torch.nn.ConvNd`, the padding and the call of the operator."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid"] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset_groups: int = 1,
        boundary: Boundary = "zeros",
    ) -> None:
        axes = self.spatial_dims
        kernel = tuple(ntuple(kernel_size, axes, "kernel_size", 1))
        strides = tuple(ntuple(stride, axes, "stride", 1))
        dilations = tuple(ntuple(dilation, axes, "dilation", 1))
        if isinstance(padding, str):
            check_choice("padding", padding, ("same", "valid"), " or numbers")
            if padding == "same" and max(strides) > 1:
                raise ValueError(f'stride is {stride!r}; it must be 1 where padding is "same"')
            total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
            before, after = [t // 2 for t in total], [t - t // 2 for t in total]
        else:
            padding = tuple(ntuple(padding, axes, "padding", 0))
            before = after = list(padding)
        check_choice("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        check_choice("boundary", boundary, CHOICES["boundary"])
        if boundary == "reflect" and before != after:
            raise ValueError(
                f'boundary is "reflect"; padding {padding!r} needs an odd kernel_size or an even dilation on every '
                f"axis; they are {kernel_size!r} and {dilation!r}"
            )
        check_channels(in_channels, out_channels, groups, offset_groups, of="in_channels")

        rest: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        window = (kernel, strides, padding, dilations)
        super().__init__(in_channels, out_channels, *window, False, (0,) * axes, groups, **rest)
        self.offset_groups = offset_groups
        self.boundary = boundary
        self._padding_before, self._padding_after = before, after

    def sampling_locations(self, offset: Tensor) -> Tensor:
        """The positions at which the layer samples its input.

        ``locations[b, g, k, o] = stride*o - padding + dilation*k + offset[b, g, k, o]``

        Args:
            offset: ``[B, og*K*N, *out]`` in pixels, with or without its batch axis.

        Returns:
            ``[B, og, K, *out, N]`` in tensor-axis order, in pixels of the input before any padding, where 0 is the
            centre of the first pixel; float32 or float64. The boundary rule is not applied: points may lie outside.

        Raises:
            ValueError: the shape of ``offset`` does not fit the layer.

        Example:
            >>> layer = PackedDeformConv2d(8, 16, 3, padding=1)
            >>> offset, mask = layer.predict(torch.randn(2, 8, 20, 30))
            >>> layer.sampling_locations(offset).shape
            torch.Size([2, 1, 9, 20, 30, 2])
        """
        axes, taps = self.spatial_dims, prod(self.kernel_size)
        check_tensor("offset", offset)
        if offset.dim() == axes + 1:
            return self.sampling_locations(offset.unsqueeze(0)).squeeze(0)
        if offset.dim() != axes + 2:
            raise ValueError(
                f"offset has shape {list(offset.shape)}; it must have {axes + 2} axes, or {axes + 1} unbatched"
            )
        self._check_offset_channels(offset)
        size = list(offset.shape[2:])
        base = tap_grid(self.kernel_size, size, self.stride, self._padding_before, self.dilation, offset.device)
        shift = offset.to(compute_dtype(offset.dtype)).unflatten(1, (self.offset_groups, taps, axes)).movedim(3, -1)
        return base + shift

    def _deform(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        axes = self.spatial_dims
        if self._is_unbatched(input, offset, mask):
            maps = [value if value is None else value.unsqueeze(0) for value in (input, offset, mask)]
            return self._deform(*maps).squeeze(0)  # type: ignore[arg-type]
        input, padding = self._pad(input)
        steps = (self.stride, padding, self.dilation)
        return _FUNCTIONS[axes](input, offset, self.weight, self.bias, *steps, mask, boundary=self.boundary)

    def _pad(self, input: Tensor) -> tuple[Tensor, list[int]]:
        """Apply the padding that the operator does not support; return the input and the padding for the operator."""
        before, after = self._padding_before, self._padding_after
        mode, rest = self.padding_mode, [0] * self.spatial_dims
        if mode == "zeros":
            # The operator applies its boundary rule outside; an extra row by the same rule changes nothing else.
            mode = "constant" if self.boundary == "zeros" else "replicate"  # type: ignore[assignment]
            after, before, rest = [a - b for a, b in zip(after, before, strict=True)], rest, before
        widths = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
        return (F.pad(input, widths, mode=mode) if any(widths) else input), rest


class _GivenDeformConv(_DeformConv):
    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve ``input`` at points that ``offset`` moves, with each tap multiplied by ``mask``."""
        return self._deform(input, offset, mask)


class DeformConv1d(_GivenDeformConv):
    """Deformable convolution of a sequence; :class:`DeformConv2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, ``offset [B, og*K, Lout]``, ``mask [B, og*K, Lout]``.

    Example:
        >>> layer = DeformConv1d(8, 16, 5, padding="same")
        >>> layer(torch.randn(2, 8, 50), torch.zeros(2, 5, 50)).shape
        torch.Size([2, 16, 50])
    """

    spatial_dims = 1


class DeformConv2d(_GivenDeformConv):
    """Deformable convolution of an image; ``forward`` takes the offsets and optionally a mask.

    ``output[b, f, o] = bias[f] + sum over c, k of
    weight[f, c, k] * mask[b, k, o] * sample(input[b, c], stride*o - padding + dilation*k + offset[b, k, o])``

    With zero offsets and no mask this is :class:`torch.nn.Conv2d`. It has the same arguments, parameters,
    initialisation and state-dict, and differs in how points outside the input are handled:

    * ``padding_mode="zeros"``: the input is not padded. Outside the input, ``boundary="zeros"`` samples 0 and
      ``boundary="border"`` the nearest pixel. The latter equals ``torch.nn.Conv2d`` with ``padding_mode="replicate"``
      if offsets are zero.
    * Any other ``padding_mode``: the input is padded first, as in ``torch.nn.Conv2d``. Points are sampled from the
      padded input, and ``boundary`` applies outside of it.
    * ``padding="same"`` with an even kernel pads one row or column more at the end than at the start.

    Args:
        in_channels: C, channels of the input.
        out_channels: Cout, channels of the output.
        kernel_size: number of taps along each axis; K in total.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels; or ``"same"`` or ``"valid"``.
        dilation: distance between two taps, in pixels.
        groups: number of groups of channels that are convolved separately.
        bias: whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        offset_groups: og, the number of groups of channels that share their offsets and masks.
        boundary: ``"zeros"``, ``"border"`` or ``"reflect"``; see above.

    Shapes of ``forward(input, offset, mask=None)``, with or without the batch axis:
        ``input [B, C, H, W]``; ``offset [B, og*K*2, Hout, Wout]`` in pixels, for each offset group the taps in
        row-major order, for each tap the shift along h, then along w; ``mask [B, og*K, Hout, Wout]``;
        output ``[B, Cout, Hout, Wout]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = DeformConv2d(8, 16, 3, padding=1)
        >>> layer(torch.randn(2, 8, 20, 30), torch.zeros(2, 18, 20, 30)).shape
        torch.Size([2, 16, 20, 30])

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """

    spatial_dims = 2


class DeformConv3d(_GivenDeformConv):
    """Deformable convolution of a volume or a video; :class:`DeformConv2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, ``offset [B, og*K*3, Dout, Hout, Wout]`` (for each tap the shifts along d, h, w),
    ``mask [B, og*K, Dout, Hout, Wout]``.

    Example:
        >>> layer = DeformConv3d(4, 5, 3, padding=1)
        >>> layer(torch.randn(1, 4, 6, 7, 8), torch.zeros(1, 81, 6, 7, 8)).shape
        torch.Size([1, 5, 6, 7, 8])
    """

    spatial_dims = 3


class _PackedDeformConv(_DeformConv):
    modulated: bool
    offset_head: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid"] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        modulated: bool = False,
        offset_groups: int = 1,
        boundary: Boundary = "zeros",
        max_offset: float | None = None,
        condition_channels: int | None = None,
    ) -> None:
        rest: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        rest |= {"groups": groups, "offset_groups": offset_groups, "boundary": boundary}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, **rest)
        if max_offset is not None and not max_offset > 0:
            raise ValueError(f"max_offset is {max_offset}; it must be positive, or None")
        if condition_channels is not None:
            check_count("condition_channels", condition_channels)
        self.modulated, self.max_offset, self.condition_channels = modulated, max_offset, condition_channels
        channels = self.offset_groups * prod(self.kernel_size)
        # Its values are set below. Drawing none keeps the random numbers those of a network of plain convolutions.
        self.offset_head = nn.utils.skip_init(
            _PLAIN[self.spatial_dims],
            self.in_channels if condition_channels is None else condition_channels,
            channels * (self.spatial_dims + modulated),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            padding_mode=self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self._reset_offset_head()

    def reset_parameters(self) -> None:
        """Initialise the weights as :class:`torch.nn.ConvNd` does and the offset head to zero."""
        super().reset_parameters()
        # The base class calls this before the head exists.
        if "offset_head" in self._modules:
            self._reset_offset_head()

    def predict(
        self, input: Tensor, condition: Tensor | None = None, base_offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the offsets ``[B, og*K*N, *out]`` in pixels, and the mask ``[B, og*K, *out]`` or None."""
        self._check_input(input)
        check_floating("input", input)
        check_alike("input", input, "weight", self.weight)
        offset = self.offset_head(self._predicted_from(input, condition))
        mask = None
        if self.modulated:
            taps = self.offset_groups * prod(self.kernel_size)
            offset, logit = offset.split([taps * self.spatial_dims, taps], dim=-self.spatial_dims - 1)
            mask = 2 * logit.sigmoid()
        if self.max_offset is not None:
            offset = self.max_offset * offset.tanh()
        return offset if base_offset is None else offset + self._base(base_offset, offset), mask

    def forward(self, input: Tensor, condition: Tensor | None = None, base_offset: Tensor | None = None) -> Tensor:
        """Convolve ``input`` at the points that the layer predicts from ``condition``, or from ``input``."""
        offset, mask = self.predict(input, condition, base_offset)
        return self._deform(input, offset, mask)

    def extra_repr(self) -> str:
        """The arguments that the base class shows, then others that are not at their defaults."""
        text = super().extra_repr() + (", modulated=True" if self.modulated else "")
        for name in ("max_offset", "condition_channels"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text

    def _predicted_from(self, input: Tensor, condition: Tensor | None) -> Tensor:
        """What the offset head reads, checked."""
        if condition is None:
            if self.condition_channels is not None:
                raise ValueError(
                    f"condition is None; this layer has condition_channels={self.condition_channels} and predicts its "
                    "offsets from it"
                )
            return input
        check_floating("condition", condition)
        check_alike("condition", condition, "input", input)
        expected = list(input.shape)
        expected[-self.spatial_dims - 1] = self.condition_channels or self.in_channels
        if list(condition.shape) != expected:
            raise ValueError(
                f"condition has shape {list(condition.shape)}; with input of shape {list(input.shape)} it must be "
                f"{expected}"
            )
        return condition

    def _base(self, base_offset: Tensor, offset: Tensor) -> Tensor:
        """The offsets that the predicted ones are added to; N channels are those of every tap."""
        check_floating("base_offset", base_offset)
        check_alike("base_offset", base_offset, "input", offset, dtype=False)
        if (base_offset.dtype == torch.float64) != (offset.dtype == torch.float64):
            raise TypeError(f"base_offset has dtype {base_offset.dtype}; the offsets have {offset.dtype}")
        expected, channels = list(offset.shape), -self.spatial_dims - 1
        if base_offset.dim() == offset.dim() and base_offset.shape[channels] == self.spatial_dims:
            repeats = [1] * offset.dim()
            repeats[channels] = offset.shape[channels] // self.spatial_dims
            base_offset = base_offset.repeat(repeats)
        if list(base_offset.shape) != expected:
            few = list(expected)
            few[channels] = self.spatial_dims
            raise ValueError(f"base_offset has shape {list(base_offset.shape)}; it must be {expected}, or {few}")
        return base_offset

    def _reset_offset_head(self) -> None:
        for parameter in self.offset_head.parameters():
            nn.init.zeros_(parameter)


class PackedDeformConv1d(_PackedDeformConv):
    """Deformable convolution of a sequence with predicted offsets; :class:`PackedDeformConv2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, output ``[B, Cout, Lout]``.

    Example:
        >>> layer = PackedDeformConv1d(8, 16, 5, padding="same", modulated=True)
        >>> layer(torch.randn(2, 8, 50)).shape
        torch.Size([2, 16, 50])
    """

    spatial_dims = 1


class PackedDeformConv2d(_PackedDeformConv):
    """Deformable convolution of an image that predicts its offsets, and its mask if ``modulated``.

    ``offset, logit = offset_head(input)``, ``mask = 2 * sigmoid(logit)``, then :class:`DeformConv2d`.

    ``offset_head`` is a plain convolution with the kernel, stride, padding and dilation of the layer. It is initialised
    to zero, so that offsets are 0 and masks are 1. A new layer therefore computes the same as :class:`torch.nn.Conv2d`
    with the same random seed, and can replace a trained one (``load_state_dict(..., strict=False)``). The mask is twice
    that of the paper, ``sigmoid(logit)``, which starts at 1/2 and would halve the output. Offsets are learned in
    pixels; if they grow too fast, use a smaller learning rate for ``offset_head``.

    Args:
        in_channels: channels of the input. Parameters that are not described here are as in :class:`DeformConv2d`.
        groups: number of groups of the layer; its offset head has one group, so that offsets depend on all channels.
        bias: whether the layer has a bias; its offset head always has one.
        padding_mode: padding mode of the layer and of its offset head.
        modulated: whether to predict a mask too (version 2).
        max_offset: if given, the predicted offsets are ``max_offset * tanh(offset)``, in pixels.
        condition_channels: channels of ``condition``; None if it has those of the input, or if none is given.

    Shapes of ``forward(input, condition=None, base_offset=None)``, with or without the batch axis:
        ``input [B, C, H, W]``; ``condition [B, condition_channels, H, W]``, from which the offsets and the mask are
        predicted instead of ``input``; ``base_offset [B, og*K*2, Hout, Wout]``, or ``[B, 2, Hout, Wout]`` for all taps
        alike, in pixels as (h, w), which is added to the predicted offsets: with optical flow this is the alignment of
        BasicVSR++. Output ``[B, Cout, Hout, Wout]``. ``offset_head`` may be replaced by a deeper network.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = PackedDeformConv2d(8, 16, 3, padding=1, modulated=True)
        >>> layer(torch.randn(2, 8, 20, 30)).shape
        torch.Size([2, 16, 20, 30])

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """

    spatial_dims = 2


class PackedDeformConv3d(_PackedDeformConv):
    """Deformable convolution of a volume with predicted offsets; :class:`PackedDeformConv2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, output ``[B, Cout, Dout, Hout, Wout]``.

    Example:
        >>> layer = PackedDeformConv3d(4, 5, 3, padding=1)
        >>> layer(torch.randn(1, 4, 6, 7, 8)).shape
        torch.Size([1, 5, 6, 7, 8])
    """

    spatial_dims = 3
