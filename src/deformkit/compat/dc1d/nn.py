"""The layers of dc1d: deformable convolution of sequences, with offsets ``[B, G, Lout, K]``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.deform_conv import DeformConv1d as _DeformConv1d
from ...nn.deform_conv import PaddingMode
from ...ops._shape import Boundary, check_count, check_tensor, compute_dtype
from ...ops.deform_conv.op import deform_conv1d
from .ops import (
    check_offsets,
    coordinates,
    efficient_linterpolate,
    full_seq_linterpolate,
    kernel_width_linterpolate,
    output_length,
    tap_shifts,
)

__all__ = ["DeformConv1d", "PackedDeformConv1d", "cLN", "gLN"]

# The smallest variance by which a normalisation divides.
_LEAST_VARIANCE = 1e-9


class DeformConv1d(_DeformConv1d):
    """The deformable convolution of a sequence of dc1d, computed by :func:`deformkit.deform_conv1d`.

    ``output[b, f, o] = bias[f] + sum over c, k of weight[f, c, k] * mask[b, o, k] *
    sample(padded[b, c], stride*o + clamp(dilation*k + offsets[b, o, k], 0, dilation*(K-1)))``

    The input is padded first. The clamp keeps every tap in its own window unless ``unconstrained``; then a point beyond
    the padded sequence reads its nearest element. Parameters and state-dict are those of :class:`torch.nn.Conv1d`.

    Args:
        in_channels: C, channels of the input.
        out_channels: channels of the output.
        kernel_size: K, number of taps.
        stride: step of the output positions, in elements.
        padding: number of elements at either end, or ``"same"`` or ``"valid"``.
        dilation: distance between two taps, in elements.
        groups: number of groups of channels that are convolved separately.
        bias: whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: the device of the parameters.
        interpolation_function: :func:`~deformkit.compat.dc1d.ops.efficient_linterpolate`,
            its equal ``kernel_width_linterpolate``, or ``full_seq_linterpolate``, where taps may leave their
            window and are 0 outside the padded sequence.
        unconstrained: whether taps may leave their window.

    Shapes of ``forward(input, offsets, mask=None)``: ``input [B, C, L]``; ``offsets [B, G, Lout, K]`` in elements, for
    any G that divides C, where the channels of a group share their offsets; ``mask`` like ``offsets``; output
    ``[B, out_channels, Lout]`` with Lout = ``expected_offset_positions(L)``.

    The buffer ``dilated_positions [K]``, which is not in the state-dict, has the positions of the taps without offsets.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = DeformConv1d(8, 16, 5, padding="same")
        >>> layer(torch.randn(2, 8, 50), torch.zeros(2, 1, 50, 5)).shape
        torch.Size([2, 16, 50])
    """

    kernel_size: Any
    stride: Any
    dilation: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = "valid",
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "reflect",
        device: torch.device | str | None = None,
        interpolation_function: Callable[..., Tensor] = efficient_linterpolate,
        unconstrained: bool | None = None,
    ) -> None:
        window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        rest: dict[str, Any] = {"groups": groups, "bias": bias, "padding_mode": padding_mode, "device": device}
        if interpolation_function not in (
            efficient_linterpolate,
            full_seq_linterpolate,
            kernel_width_linterpolate,
        ):
            raise ValueError(
                f"interpolation_function is {interpolation_function!r}; it must be one of deformkit.compat.dc1d.ops"
            )
        if unconstrained and interpolation_function is kernel_width_linterpolate:
            raise ValueError("unconstrained is True; kernel_width_linterpolate keeps every tap in its window")
        free = interpolation_function is full_seq_linterpolate
        boundary: Boundary = "zeros" if free else "border"
        super().__init__(in_channels, out_channels, kernel_size, **window, **rest, boundary=boundary)
        # dc1d stores one number each; torch stores tuples.
        self.kernel_size, self.stride, self.dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        positions = torch.arange(self.kernel_size, dtype=torch.float32, device=device) * self.dilation
        self.register_buffer("dilated_positions", positions, persistent=False)
        self.interpolation_function = interpolation_function
        self.unconstrained = free or bool(unconstrained)

    def expected_offset_positions(self, length: int) -> int:
        """Lout, the number of output positions, for an input of ``length`` elements."""
        padded = length + sum(self._padding_before) + sum(self._padding_after)
        return output_length(padded, self.kernel_size, self.dilation, self.stride)

    def forward(self, input: Tensor, offsets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the convolution of ``input`` at points moved by ``offsets``, with taps multiplied by ``mask``."""
        self._check(input, offsets, mask)
        padded, _ = self._pad(input)
        shift = tap_shifts(coordinates(offsets, input), self.dilation, not self.unconstrained)
        factors = None if mask is None else mask.to(input.dtype).transpose(2, 3).flatten(1, 2)
        window = (self.stride, 0, self.dilation)
        return deform_conv1d(padded, shift, self.weight, self.bias, *window, factors, boundary=self.boundary)

    def sampling_locations(self, offset: Tensor) -> Tensor:
        """The positions at which the layer samples its input, for the offsets of :meth:`forward`.

        Args:
            offset: ``[B, G, Lout, K]``, in elements.

        Returns:
            ``[B, G, K, Lout, 1]`` in elements of the input before any padding: 0 is the first. Taps are clamped to
            their windows as in the layer; points may lie outside the sequence.

        Raises:
            ValueError: the shape of ``offset`` does not fit the layer.

        Example:
            >>> layer = DeformConv1d(8, 16, 3, padding="same")
            >>> layer.sampling_locations(torch.full((1, 1, 50, 3), 0.25))[0, 0, :, 10, 0]
            tensor([ 9.2500, 10.2500, 11.0000])
        """
        check_tensor("offset", offset)
        taps, step, dilation = self.kernel_size, self.stride, self.dilation
        if offset.dim() != 4 or offset.shape[3] != taps:
            raise ValueError(f"offset has shape {list(offset.shape)}; it must be [B, G, Lout, {taps}]")
        shift = tap_shifts(offset.to(compute_dtype(offset.dtype)), dilation, not self.unconstrained)
        first = torch.arange(offset.shape[2], device=offset.device) * step - self._padding_before[0]
        base = torch.arange(taps, device=offset.device).unsqueeze(1) * dilation + first
        return (base + shift.unflatten(1, (-1, taps))).unsqueeze(-1)

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        padding = self.padding if isinstance(self.padding, str) else self.padding[0]
        rest = {"padding": padding, "dilation": self.dilation, "groups": self.groups, "bias": self.bias is not None}
        rest |= {"padding_mode": self.padding_mode, "unconstrained": self.unconstrained}
        defaults = ("valid", 1, 1, True, "reflect", False)
        others = zip(rest.items(), defaults, strict=True)
        return text + "".join(f", {name}={value!r}" for (name, value), default in others if value != default)

    def _pad(self, input: Tensor) -> tuple[Tensor, list[int]]:
        # Zeros are padded, too: dc1d clamps a point to the edge of the padded sequence, not of the input.
        widths = [*self._padding_before, *self._padding_after]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return (F.pad(input, widths, mode=mode) if any(widths) else input), [0]

    def _check(self, input: Tensor, offsets: Tensor, mask: Tensor | None) -> None:
        check_offsets(offsets, "input", input, self.kernel_size)
        if input.shape[1] != self.in_channels:
            raise ValueError(f"input has {input.shape[1]} channels; this layer has in_channels={self.in_channels}")
        found, length = offsets.shape[2], input.shape[2]
        expected = self.expected_offset_positions(length)
        if found != expected:
            padding = self.padding if isinstance(self.padding, str) else self.padding[0]
            message = (
                f"offsets has {found} positions; with padding={padding!r} the layer has {expected} for an input of "
                f"length {length}"
            )
            if found == output_length(length, self.kernel_size, self.dilation, self.stride):
                message += f': {found} is sized for padding="valid" while the layer says padding={padding!r}'
            raise ValueError(message)
        if mask is not None:
            check_tensor("mask", mask)
            if mask.shape != offsets.shape:
                raise ValueError(f"mask shape is {list(mask.shape)}; it must be {list(offsets.shape)}, as offsets")


class PackedDeformConv1d(DeformConv1d):
    """A :class:`DeformConv1d` that predicts its offsets, and a mask if ``modulated``, by separable convolutions.

    ``features = odc_norm(odc_prelu(offset_dconv(input)))``, then
    ``offsets = odp_norm(odp_prelu(offset_pconv(features)))`` and
    ``mask = sigmoid(mdp_norm(mdp_prelu(mask_pconv(features))))``.

    The names of the parameters are those of dc1d. Offsets do not start at zero: their last step is a normalisation.

    Args:
        in_channels: channels of the input. Parameters that are not described here are as in :class:`DeformConv1d`.
        offset_groups: G; the channels of an offset group share their offsets and masks.
        modulated: whether to predict a mask, too; it starts at 1/2.

    Shapes of ``forward(input, with_offsets=False)``: ``input [B, C, L]``, output ``[B, out_channels, Lout]``. With
    ``with_offsets`` it is a pair: the output, and the offsets ``[B, G, Lout, K]`` or, if modulated, offsets and mask.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = PackedDeformConv1d(8, 16, 5, padding="same", offset_groups=2)
        >>> output, offsets = layer(torch.randn(2, 8, 50), with_offsets=True)
        >>> output.shape, offsets.shape
        (torch.Size([2, 16, 50]), torch.Size([2, 2, 50, 5]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = "valid",
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "reflect",
        offset_groups: int = 1,
        device: torch.device | str | None = None,
        interpolation_function: Callable[..., Tensor] = efficient_linterpolate,
        unconstrained: bool | None = None,
        modulated: bool = False,
    ) -> None:
        window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        rest: dict[str, Any] = {"groups": groups, "bias": bias, "padding_mode": padding_mode, "device": device}
        rest |= {"interpolation_function": interpolation_function, "unconstrained": unconstrained}
        super().__init__(in_channels, out_channels, kernel_size, **window, **rest)
        check_count("offset_groups", offset_groups)
        if in_channels % offset_groups:
            raise ValueError(
                f"offset_groups is {offset_groups}; it must be a divisor of in_channels, which is {in_channels}"
            )
        self.offset_groups = offset_groups
        self.modulated = bool(modulated)

        head: dict[str, Any] = {"bias": False, "device": device}
        self.offset_dconv = nn.Conv1d(
            in_channels, in_channels, kernel_size, **window, groups=in_channels, padding_mode=padding_mode, **head
        )
        self.odc_norm, self.odc_prelu = gLN(in_channels, device), nn.PReLU(device=device)
        taps = self.kernel_size * offset_groups
        self.offset_pconv = nn.Conv1d(in_channels, taps, 1, **head)
        self.odp_norm, self.odp_prelu = gLN(taps, device), nn.PReLU(device=device)
        if self.modulated:
            self.mask_pconv = nn.Conv1d(in_channels, taps, 1, **head)
            self.mdp_norm, self.mdp_prelu = gLN(taps, device), nn.PReLU(device=device)
            nn.init.zeros_(self.mask_pconv.weight)

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict the offsets ``[B, G, Lout, K]`` in elements, and the mask of that shape or None, for an input."""
        features = _normalised(self.offset_dconv(input), self.odc_prelu, self.odc_norm).transpose(1, 2)
        offsets = self._by_tap(_normalised(self.offset_pconv(features), self.odp_prelu, self.odp_norm))
        if not self.modulated:
            return offsets, None
        return offsets, self._by_tap(_normalised(self.mask_pconv(features), self.mdp_prelu, self.mdp_norm)).sigmoid()

    def forward(  # type: ignore[override]
        self, input: Tensor, with_offsets: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Convolve ``input`` at the points that the layer predicts from it."""
        offsets, mask = self.predict(input)
        output = super().forward(input, offsets, mask)
        if not with_offsets:
            return output
        return output, (offsets if mask is None else (offsets, mask))

    def extra_repr(self) -> str:
        """The arguments of the base class, and whether there is a mask."""
        return super().extra_repr() + (", modulated=True" if self.modulated else "")

    def _by_tap(self, channels_last: Tensor) -> Tensor:
        """``[B, Lout, G*K]`` as ``[B, G, Lout, K]``."""
        return channels_last.unflatten(2, (self.offset_groups, -1)).transpose(1, 2)


class gLN(nn.Module):
    """Normalisation over all positions and channels of a sequence: ``gamma * (y - mean) / sqrt(variance) + beta``.

    The variance is at least 1e-9. Sums are computed in float32, or float64.

    Args:
        channel_size: C, number of channels.
        device: the device of the parameters.

    Shapes: ``[B, L, C]``, channels last; output the same.

    Example:
        >>> gLN(3)(torch.randn(2, 50, 3)).shape
        torch.Size([2, 50, 3])
    """

    _axes: tuple[int, ...] = (1, 2)

    def __init__(self, channel_size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, 1, channel_size, device=device))
        self.beta = nn.Parameter(torch.empty(1, 1, channel_size, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``gamma`` to one and ``beta`` to zero."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, y: Tensor) -> Tensor:
        """Normalise ``y``."""
        wide = y.to(compute_dtype(y.dtype))
        centred = wide - wide.mean(self._axes, keepdim=True)
        variance = centred.square().mean(self._axes, keepdim=True)
        return (centred / variance.clamp_min(_LEAST_VARIANCE).sqrt()).to(y.dtype) * self.gamma + self.beta


class cLN(gLN):
    """Like :class:`gLN`, but over the channels of each position separately.

    Example:
        >>> cLN(3)(torch.randn(2, 50, 3)).shape
        torch.Size([2, 50, 3])
    """

    _axes = (2,)


def _normalised(channels_first: Tensor, activation: nn.Module, norm: nn.Module) -> Tensor:
    """Apply both to ``[B, C, L]``; the result has the channels last, as the norm needs them: ``[B, L, C]``."""
    return norm(activation(channels_first).transpose(1, 2))
