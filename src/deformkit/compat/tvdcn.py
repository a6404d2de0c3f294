"""``tvdcn.ops``: deformable convolution and its transpose in one, two and three dimensions, with tvdcn's signatures."""

from collections.abc import Callable, Sequence
from math import lcm, prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import ops as deformkit_ops
from ..nn.deform_conv import PaddingMode, _DeformConv
from ..nn.deform_conv_transpose import _DeformConvTranspose
from ..ops._shape import check_choice, check_count, check_floating, conv_output_size, ntuple

__all__ = [
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformConvTranspose1d",
    "DeformConvTranspose2d",
    "DeformConvTranspose3d",
    "PackedDeformConv1d",
    "PackedDeformConv2d",
    "PackedDeformConv3d",
    "PackedDeformConvTranspose1d",
    "PackedDeformConvTranspose2d",
    "PackedDeformConvTranspose3d",
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "deform_conv_transpose1d",
    "deform_conv_transpose2d",
    "deform_conv_transpose3d",
]

Ints = int | Sequence[int]
Activation = Callable[[Tensor], Tensor] | str | None

_PLAIN: dict[int, type[torch_nn.Module]] = {1: torch_nn.Conv1d, 2: torch_nn.Conv2d, 3: torch_nn.Conv3d}


def _deform_conv(axes: int) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(deformkit_ops, f"deform_conv{axes}d")

    def deform_conv(
        input: Tensor,
        weight: Tensor,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> Tensor:
        check_floating("input", input)
        batched = input.dim() != axes + 1
        input, offset, mask = _batches(batched, input, offset, mask)  # type: ignore[assignment]
        if input.shape[1:2] != torch.Size([weight.shape[1] * groups]):
            raise ValueError(
                f"groups is {groups}; input of shape {list(input.shape)} and weight of shape {list(weight.shape)} "
                f"need {input.shape[1] / weight.shape[1]:g}"
            )
        window: list[list[int]] = [
            ntuple(value, axes, name, least)
            for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
        ]
        size = conv_output_size(input.shape[2:], weight.shape[2:], *window)
        offset, mask = _maps(offset, mask, input, weight.shape[2:], size)
        output = function(input, offset, weight, bias, *window, mask)
        return output if batched else output.squeeze(0)

    return _named(deform_conv, f"deform_conv{axes}d", "``[Cout, C/groups, *kernel]``", "output")


def _deform_conv_transpose(axes: int) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(deformkit_ops, f"deform_conv_transpose{axes}d")

    def deform_conv_transpose(
        input: Tensor,
        weight: Tensor,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> Tensor:
        check_floating("input", input)
        batched = input.dim() != axes + 1
        input, offset, mask = _batches(batched, input, offset, mask)  # type: ignore[assignment]
        offset, mask = _maps(offset, mask, input, weight.shape[2:], input.shape[2:])
        steps = (stride, padding, output_padding, groups, dilation)
        output = function(input, offset, weight, bias, *steps, mask)
        return output if batched else output.squeeze(0)

    return _named(deform_conv_transpose, f"deform_conv_transpose{axes}d", "``[C, Cout/groups, *kernel]``", "input")


def _named(function: Callable[..., Tensor], name: str, weight: str, maps: str) -> Callable[..., Tensor]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"""As ``tvdcn.ops.{name}``; see :func:`deformkit.{name}` for the formula.

    Args:
        input: ``[B, C, *in]``, or ``[C, *in]`` if all maps have no batch.
        weight: {weight}.
        offset: ``[B, og*K*N, *size]`` in pixels with the size of the {maps}, or None: no shift.
        mask: ``[B, mg*K, *size]``, the factors of the taps, or None. The number of its groups may be another.
        bias: ``[Cout]`` or None.
        stride: as in torch. So are all further arguments.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or size does not fit; the message names the argument.
    """
    return function


def _batches(batched: bool, *maps: Tensor | None) -> list[Tensor | None]:
    return [value if value is None or batched else value.unsqueeze(0) for value in maps]


def _maps(
    offset: Tensor | None, mask: Tensor | None, input: Tensor, kernel: Sequence[int], size: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """The offsets, zero if there are none, and the mask in as many groups as them."""
    axes, taps = len(kernel), prod(kernel)
    if offset is None:
        offset = input.new_zeros(()).expand(input.shape[0], taps * axes, *size)
    if mask is None:
        return offset, None
    counts = offset.shape[1] // (taps * axes), mask.shape[1] // taps
    if 0 in counts or counts[0] == counts[1]:
        return offset, mask
    groups = lcm(*counts)
    wide = [
        value.unflatten(1, (count, -1)).repeat_interleave(groups // count, 1).flatten(1, 2)
        for value, count in zip((offset, mask), counts, strict=True)
    ]
    return wide[0], wide[1]


deform_conv1d, deform_conv2d, deform_conv3d = (_deform_conv(axes) for axes in (1, 2, 3))
deform_conv_transpose1d, deform_conv_transpose2d, deform_conv_transpose3d = (
    _deform_conv_transpose(axes) for axes in (1, 2, 3)
)
_CONV = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}
_TRANSPOSE = {1: deform_conv_transpose1d, 2: deform_conv_transpose2d, 3: deform_conv_transpose3d}


class _Groups:
    """A layer whose number of offset groups is read off the offsets at each call, as in tvdcn."""

    def _check_offset_channels(self: Any, offset: Tensor) -> None:
        self.offset_groups = max(offset.shape[1] // (prod(self.kernel_size) * self.spatial_dims), 1)
        super()._check_offset_channels(offset)  # type: ignore[misc]


class _Conv(_Groups, _DeformConv):
    def _convolve(self, input: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        self._check_input(input)
        padded, padding = self._pad(input)
        steps = (self.stride, padding, self.dilation, self.groups)
        return _CONV[self.spatial_dims](padded, self.weight, offset, mask, self.bias, *steps)


class _GivenConv(_Conv):
    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve ``input`` at points that ``offset`` moves, with each tap multiplied by ``mask``."""
        return self._convolve(input, offset, mask)


class _Transpose(_Groups, _DeformConvTranspose):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rest = (groups, bias, dilation, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, output_padding, *rest)

    def _transpose(
        self, input: Tensor, offset: Tensor | None, mask: Tensor | None, output_size: Sequence[int] | None
    ) -> Tensor:
        self._check_input(input)
        window: Any = (self.stride, self.padding, self.kernel_size, self.spatial_dims, self.dilation)
        extra = self._output_padding(input, None if output_size is None else list(output_size), *window)
        steps = (self.stride, self.padding, extra, self.dilation, self.groups)
        return _TRANSPOSE[self.spatial_dims](input, self.weight, offset, mask, self.bias, *steps)


class _GivenTranspose(_Transpose):
    def forward(
        self, input: Tensor, offset: Tensor, mask: Tensor | None = None, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """Add every tap, multiplied by ``mask``, to the output at the point where ``offset`` moves it."""
        return self._transpose(input, offset, mask, output_size)


class _Generators:
    """The parts of a packed layer that predict offsets and masks."""

    def _generate(
        self: Any,
        window: dict[str, Any],
        offset_groups: int,
        mask_groups: int,
        bias: bool,
        deformable: bool,
        modulated: bool,
        offset_activation: Activation,
        mask_activation: Activation,
    ) -> None:
        for name, count in (("offset_groups", offset_groups), ("mask_groups", mask_groups)):
            check_count(name, count)
            for channels in ("in_channels", "out_channels"):
                if getattr(self, channels) % count:
                    raise ValueError(
                        f"{channels} is {getattr(self, channels)}; it must be divisible by {name}, {count}"
                    )
        if isinstance(offset_activation, str):
            raise ValueError(f"offset_activation is {offset_activation!r}; it must be a function or None")
        if isinstance(mask_activation, str):
            check_choice("mask_activation", mask_activation, ("sigmoid", "softmax"), ", a function or None")
        self.offset_groups, self.mask_groups = offset_groups, mask_groups
        self.deformable, self.modulated = deformable, modulated
        self.offset_activation, self.mask_activation = offset_activation, mask_activation
        axes, taps = self.spatial_dims, prod(self.kernel_size)
        for name, wanted, groups, channels in (
            ("offset_generator", deformable, offset_groups, offset_groups * taps * axes),
            ("mask_generator", modulated, mask_groups, mask_groups * taps),
        ):
            head = None
            if wanted:
                rest = {"device": self.weight.device, "dtype": self.weight.dtype}
                head = _PLAIN[axes](self.in_channels, channels, **window, groups=groups, bias=bias, **rest)
            self.register_module(name, head)
        self._reset_generators()

    def reset_parameters(self: Any) -> None:
        """Initialise the weights as torch does, and the parts that predict to zero."""
        super().reset_parameters()  # type: ignore[misc]
        self._reset_generators()

    def _reset_generators(self: Any) -> None:
        # The base class resets its parameters before these parts exist.
        for head in (self._modules.get("offset_generator"), self._modules.get("mask_generator")):
            for parameter in () if head is None else head.parameters():
                torch_nn.init.zeros_(parameter)

    def _predicted(self: Any, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        offset = mask = None
        if self.offset_generator is not None:
            offset = self.offset_generator(input)
            if self.offset_activation is not None:
                offset = self.offset_activation(offset)
        if self.mask_generator is not None:
            mask = self.mask_generator(input)
            if self.mask_activation == "sigmoid":
                mask = 2 * mask.sigmoid()
            elif self.mask_activation == "softmax":
                axis = mask.dim() - self.spatial_dims - 1
                mask = mask.unflatten(axis, (self.mask_groups, -1)).softmax(axis + 1).flatten(axis, axis + 1)
            elif self.mask_activation is not None:
                mask = self.mask_activation(mask)
        return offset, mask


class _PackedConv(_Generators, _Conv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        offset_groups: int = 1,
        mask_groups: int = 1,
        bias: bool = True,
        generator_bias: bool = False,
        deformable: bool = True,
        modulated: bool = False,
        offset_activation: Activation = None,
        mask_activation: Activation = "sigmoid",
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rest = (groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, *rest)  # type: ignore[arg-type]
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        switches = (generator_bias, deformable, modulated, offset_activation, mask_activation)
        self._generate({"kernel_size": self.kernel_size, **window}, offset_groups, mask_groups, *switches)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` at the points that the layer predicts from it."""
        return self._convolve(input, *self._predicted(input))


class _PackedTranspose(_Generators, _Transpose):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        output_padding: Ints = 0,
        groups: int = 1,
        offset_groups: int = 1,
        mask_groups: int = 1,
        bias: bool = True,
        generator_bias: bool = False,
        deformable: bool = True,
        modulated: bool = False,
        offset_activation: Activation = None,
        mask_activation: Activation = "sigmoid",
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rest = (output_padding, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, *rest)
        switches = (generator_bias, deformable, modulated, offset_activation, mask_activation)
        self._generate({"kernel_size": 1}, offset_groups, mask_groups, *switches)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Add every tap to the output at the point that the layer predicts from ``input``."""
        return self._transpose(input, *self._predicted(input), output_size)


class DeformConv1d(_GivenConv):
    """The layer ``tvdcn.ops.DeformConv1d``; see :class:`deformkit.nn.DeformConv1d`."""

    spatial_dims = 1


class DeformConv2d(_GivenConv):
    """The layer ``tvdcn.ops.DeformConv2d``; see :class:`deformkit.nn.DeformConv2d`."""

    spatial_dims = 2


class DeformConv3d(_GivenConv):
    """The layer ``tvdcn.ops.DeformConv3d``; see :class:`deformkit.nn.DeformConv3d`."""

    spatial_dims = 3


class PackedDeformConv1d(_PackedConv):
    """The layer ``tvdcn.ops.PackedDeformConv1d``; see :class:`deformkit.nn.PackedDeformConv1d`."""

    spatial_dims = 1


class PackedDeformConv2d(_PackedConv):
    """The layer ``tvdcn.ops.PackedDeformConv2d``; see :class:`deformkit.nn.PackedDeformConv2d`."""

    spatial_dims = 2


class PackedDeformConv3d(_PackedConv):
    """The layer ``tvdcn.ops.PackedDeformConv3d``; see :class:`deformkit.nn.PackedDeformConv3d`."""

    spatial_dims = 3


class DeformConvTranspose1d(_GivenTranspose):
    """The layer ``tvdcn.ops.DeformConvTranspose1d``; see :class:`deformkit.nn.DeformConvTranspose1d`."""

    spatial_dims = 1


class DeformConvTranspose2d(_GivenTranspose):
    """The layer ``tvdcn.ops.DeformConvTranspose2d``; see :class:`deformkit.nn.DeformConvTranspose2d`."""

    spatial_dims = 2


class DeformConvTranspose3d(_GivenTranspose):
    """The layer ``tvdcn.ops.DeformConvTranspose3d``; see :class:`deformkit.nn.DeformConvTranspose3d`."""

    spatial_dims = 3


class PackedDeformConvTranspose1d(_PackedTranspose):
    """The layer ``tvdcn.ops.PackedDeformConvTranspose1d``; see :class:`deformkit.nn.PackedDeformConvTranspose1d`."""

    spatial_dims = 1


class PackedDeformConvTranspose2d(_PackedTranspose):
    """The layer ``tvdcn.ops.PackedDeformConvTranspose2d``; see :class:`deformkit.nn.PackedDeformConvTranspose2d`."""

    spatial_dims = 2


class PackedDeformConvTranspose3d(_PackedTranspose):
    """The layer ``tvdcn.ops.PackedDeformConvTranspose3d``; see :class:`deformkit.nn.PackedDeformConvTranspose3d`."""

    spatial_dims = 3
