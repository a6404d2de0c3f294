"""Deformable convolution as in ``mmcv.ops``: functions and layers."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from torch import Tensor
from torch.nn import Conv2d, init
from torch.nn import functional as F

from ... import nn
from ...ops._shape import check_tensor, ntuple, prod
from .._convolution import convolve


class ArgumentValueError(ValueError, AssertionError):
    """A ValueError, and the AssertionError that mmcv raises in its place when a layer is made."""


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Deformable convolution without a mask, as ``mmcv.ops.deform_conv2d``; see :func:`deformkit.deform_conv2d`.

    Args:
        input: ``[B, C, H, W]``; it and ``weight`` are taken in the dtype of ``offset``, as in mmcv.
        offset: ``[B, deform_groups*kh*kw*2, Hout, Wout]`` in pixels, for each tap the shift along h, then along w.
        weight: ``[Cout, C/groups, kh, kw]``.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels.
        dilation: distance between two taps, in pixels.
        groups: number of groups of channels that are convolved separately.
        deform_groups: number of groups of channels that share their offsets.
        bias: must be False.
        im2col_step: has no effect; the batch may have any size.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``offset``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or number of groups does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 4, 3, 3)
        >>> deform_conv2d(input, torch.zeros(2, 36, 20, 30), weight, 1, 1, 1, 2, 2).shape
        torch.Size([2, 16, 20, 30])
    """
    if bias is not False:
        raise ValueError(f"bias is {bias!r}; deform_conv2d has none: it must be False")
    return convolve(input, offset, weight, None, stride, padding, dilation, None, groups, deform_groups)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Deformable convolution with a mask, as ``mmcv.ops.modulated_deform_conv2d``.

    Args:
        input: ``[B, C, H, W]``. Parameters that are not described here are as in :func:`deform_conv2d`.
        offset: in pixels.
        mask: ``[B, deform_groups*kh*kw, Hout, Wout]`` factors of the taps.
        weight: of the taps.
        bias: ``[Cout]`` or None.
        stride: of the output positions.
        padding: of the input.
        dilation: of the taps.
        groups: of channels.
        deform_groups: of offsets and masks.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``offset``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or number of groups does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 8, 3, 3)
        >>> offset, mask = torch.zeros(2, 18, 20, 30), torch.ones(2, 9, 20, 30)
        >>> modulated_deform_conv2d(input, offset, mask, weight, None, 1, 1).shape
        torch.Size([2, 16, 20, 30])
    """
    check_tensor("mask", mask)
    return convolve(input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups)


class DeformConv2d(nn.DeformConv2d):
    """The layer ``mmcv.ops.DeformConv2d``: deformable convolution without mask and bias, offsets given.

    The arguments, the initialisation and the state-dict are mmcv's.

    Args:
        in_channels: C, channels of the input.
        out_channels: Cout, channels of the output.
        kernel_size: number of taps along each axis.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels.
        dilation: distance between two taps, in pixels.
        groups: number of groups of channels that are convolved separately.
        deform_groups: number of groups of channels that share their offsets.
        bias: must be False.
        im2col_step: has no effect; the batch may have any size.

    Shapes of ``forward(x, offset)``: as those of :func:`deform_conv2d`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument. In the constructor it is also an
            AssertionError, as in mmcv.

    Example:
        >>> import torch
        >>> layer = DeformConv2d(8, 16, 3, padding=1, deform_groups=2)
        >>> layer(torch.randn(2, 8, 20, 30), torch.zeros(2, 36, 20, 30)).shape
        torch.Size([2, 16, 20, 30])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        if bias:
            raise ArgumentValueError(f"bias is {bias!r}; DeformConv2d has none: it must be False")
        window = (kernel_size, stride, ntuple(padding, 2, "padding", 0), dilation)
        try:
            super().__init__(in_channels, out_channels, *window, groups, False, offset_groups=deform_groups)
        except ValueError as error:
            raise ArgumentValueError(str(error)) from error
        # A layer of mmcv without a bias has no attribute of that name.
        del self.bias
        self.deform_groups = deform_groups
        self.im2col_step = im2col_step

    def reset_parameters(self) -> None:
        """Initialise the weight as mmcv does."""
        init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]  # the host's arguments
        """Convolve ``x`` at points that ``offset`` moves."""
        return _forward(self, x, offset)

    def extra_repr(self) -> str:
        """The arguments, by name as mmcv shows them."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "deform_groups",
        )
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class DeformConv2dPack(DeformConv2d):
    """The layer ``mmcv.ops.DeformConv2dPack`` ("DCN"), which predicts its offsets.

    ``DeformConv2d(x, conv_offset(x))``, where ``conv_offset`` is a plain convolution that starts at zero. For the layer
    of deformkit that does so see :class:`deformkit.nn.PackedDeformConv2d` and
    :func:`deformkit.compat.convert.from_mmcv`.

    Arguments as those of :class:`DeformConv2d`.

    Shapes of ``forward(x)``: ``x [B, C, H, W]``, output ``[B, Cout, Hout, Wout]``.

    Example:
        >>> import torch
        >>> DeformConv2dPack(8, 16, 3, padding=1)(torch.randn(2, 8, 20, 30)).shape
        torch.Size([2, 16, 20, 30])
    """

    _version = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = offset_head(self, 2)
        self.init_offset()

    def init_offset(self) -> None:
        """Set the predicted offsets to zero."""
        zero_head(self.conv_offset)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # it predicts the offsets
        """Convolve ``x`` at the points that the layer predicts from it."""
        return _forward(self, x, self.conv_offset(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_old_head(state_dict, prefix, args[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


class ModulatedDeformConv2d(nn.DeformConv2d):
    """The layer ``mmcv.ops.ModulatedDeformConv2d``: deformable convolution with offsets and a mask given.

    The arguments, the initialisation and the state-dict are mmcv's.

    Args:
        in_channels: channels of the input. Parameters that are not described here are as in :class:`DeformConv2d`.
        out_channels: of the output.
        kernel_size: number of taps.
        stride: of the output positions.
        padding: of the input.
        dilation: of the taps.
        groups: of channels.
        deform_groups: of offsets and masks.
        bias: whether to add a learnable bias.

    Shapes of ``forward(x, offset, mask)``: as those of :func:`modulated_deform_conv2d`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = ModulatedDeformConv2d(8, 16, 3, padding=1)
        >>> layer(torch.randn(2, 8, 20, 30), torch.zeros(2, 18, 20, 30), torch.ones(2, 9, 20, 30)).shape
        torch.Size([2, 16, 20, 30])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        window = (kernel_size, stride, ntuple(padding, 2, "padding", 0), dilation)
        super().__init__(in_channels, out_channels, *window, groups, bool(bias), offset_groups=deform_groups)
        self.deform_groups = deform_groups

    def init_weights(self) -> None:
        """Initialise the weight as mmcv does and the bias to zero."""
        bound = 1 / sqrt(self.in_channels * prod(self.kernel_size))
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """As :meth:`init_weights`."""
        self.init_weights()

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve ``x`` at points that ``offset`` moves, with each tap multiplied by ``mask``."""
        check_tensor("mask", mask)
        return _modulated_forward(self, x, offset, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """The layer ``mmcv.ops.ModulatedDeformConv2dPack`` ("DCNv2"), which predicts its offsets and mask.

    ``conv_offset(x)``, a plain convolution that starts at zero, holds the offsets and behind them the logits of the
    mask ``sigmoid(logit)``, which so starts at 1/2. For the layer of deformkit that does so see
    :class:`deformkit.nn.PackedDeformConv2d` and :func:`deformkit.compat.convert.from_mmcv`.

    Arguments as those of :class:`ModulatedDeformConv2d`.

    Shapes of ``forward(x)``: ``x [B, C, H, W]``, output ``[B, Cout, Hout, Wout]``.

    Example:
        >>> import torch
        >>> ModulatedDeformConv2dPack(8, 16, 3, padding=1)(torch.randn(2, 8, 20, 30)).shape
        torch.Size([2, 16, 20, 30])
    """

    _version = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = offset_head(self, 3)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the weight as mmcv does and the other parameters to zero."""
        super().init_weights()
        # The base class calls this before the head exists.
        if "conv_offset" in self._modules:
            zero_head(self.conv_offset)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # it predicts the offsets
        """Convolve ``x`` at the points that the layer predicts from it."""
        return _modulated_forward(self, x, *split_head(self.conv_offset(x)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_old_head(state_dict, prefix, args[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


def offset_head(layer: nn.DeformConv2d, per_tap: int) -> Conv2d:
    """A plain convolution that predicts ``per_tap`` numbers for each tap of ``layer``."""
    channels = layer.offset_groups * per_tap * prod(layer.kernel_size)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return Conv2d(layer.in_channels, channels, *window)  # type: ignore[arg-type]  # tuples of two


def split_head(predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets and the mask, from what a modulated layer predicts: two parts in three, then the logits."""
    taps = predicted.shape[1] // 3
    offset, logit = predicted.split([2 * taps, taps], 1)
    return offset, logit.sigmoid()


def zero_head(module: Conv2d) -> None:
    """Set what it predicts to zero."""
    for parameter in module.parameters():
        init.zeros_(parameter)


def _rename_old_head(state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Before version 2 the head of a layer ``conv2`` lay beside it, as ``conv2_offset``.

    It is found where a loader hands the whole state-dict to each layer, as mmengine does. torch hands on only what is
    below the layer's own name: there :func:`deformkit.compat.convert.rename_offset_heads` comes first.
    """
    if metadata.get("version", 1) >= 2:
        return
    for part in ("weight", "bias"):
        old, new = f"{prefix[:-1]}_offset.{part}", f"{prefix}conv_offset.{part}"
        if old in state_dict and new not in state_dict:
            state_dict[new] = state_dict.pop(old)


# Both read nothing of a layer but what mmcv's own has: where that is patched, they are its forward.


def _forward(layer: Any, x: Tensor, offset: Tensor) -> Tensor:
    check_tensor("x", x)
    check_tensor("offset", offset)
    # An input smaller than the kernel is extended below and to the right, and the output cut by as much.
    below, right = (max(k - s, 0) for k, s in zip(layer.kernel_size, x.shape[-2:], strict=True))
    if below or right:
        x, offset = F.pad(x, (0, right, 0, below)), F.pad(offset, (0, right, 0, below))
    steps = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.deform_groups)
    output = deform_conv2d(x, offset, layer.weight, *steps)
    return output[:, :, : output.shape[2] - below, : output.shape[3] - right] if below or right else output


def _modulated_forward(layer: Any, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    steps = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.deform_groups)
    return modulated_deform_conv2d(x, offset, mask, layer.weight, layer.bias, *steps)
