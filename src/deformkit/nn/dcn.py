"""The layers DCNv3 and DCNv4: deformable aggregation between linear maps, on tensors with channels last."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..ops._shape import check_choice, check_count, check_tensor, checked_output_size, compute_dtype, ntuple, times
from ..ops.deform_aggregate.op import check_offset_scale, deform_aggregate, tap_count
from ..ops.deform_aggregate.reference import points
from ._linear import linear
from ._public import named_elsewhere

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_with_hints = named_elsewhere(in_channels="channels", dim="channels", padding="pad", groups="group", num_heads="group")
_ACTIVATION: dict[str, type[nn.Module]] = {"GELU": nn.GELU, "SiLU": nn.SiLU, "ReLU": nn.ReLU}


class _DCN(nn.Module):
    """The base of both layers: the window, and the steps before and after the operator."""

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        pad: int | Sequence[int],
        dilation: int | Sequence[int],
        group: int,
        offset_scale: float,
        dw_kernel_size: int | Sequence[int] | None,
        center_feature_scale: bool,
        remove_center: bool,
        spatial_dims: int,
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it must be 1, 2 or 3")
        for name, count in (("channels", channels), ("group", group)):
            check_count(name, count)
        if channels % group:
            raise ValueError(f"channels is {channels}; it must be divisible by group, which is {group}")
        check_offset_scale(offset_scale)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.kernel_size = tuple(ntuple(kernel_size, spatial_dims, "kernel_size", 1))
        self.stride = tuple(ntuple(stride, spatial_dims, "stride", 1))
        self.pad = tuple(ntuple(pad, spatial_dims, "pad", 0))
        self.dilation = tuple(ntuple(dilation, spatial_dims, "dilation", 1))
        self.group = group
        self.offset_scale = offset_scale
        self.dw_kernel_size: tuple[int, ...] | None = None
        if dw_kernel_size is not None:
            self.dw_kernel_size = tuple(ntuple(dw_kernel_size, spatial_dims, "dw_kernel_size", 1))
            if any(k % 2 == 0 for k in self.dw_kernel_size):
                raise ValueError(f"dw_kernel_size is {times(self.dw_kernel_size)}; it must be odd")
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self._taps = tap_count(self.kernel_size, remove_center)

    def sampling_locations(self, offset: Tensor) -> Tensor:
        """The positions at which the layer samples its input.

        ``locations = stride*o - pad + centre + offset_scale * (dilation*k - centre + offset)``

        Args:
            offset: ``[N, *out, group, K, spatial_dims]`` in pixels, as :meth:`predict` returns it.

        Returns:
            The positions in the same shape, in tensor-axis order, in pixels of the input, where 0 is the centre of the
            first pixel; float32 or float64. Points may lie outside.

        Raises:
            ValueError: the shape of ``offset`` does not fit the layer.

        Example:
            >>> import torch
            >>> layer = DCNv4(64)
            >>> offset, mask = layer.predict(torch.randn(2, 20, 30, 64))
            >>> layer.sampling_locations(offset)[0, 5, 7, 0, 3]
            tensor([5., 6.], grad_fn=<SelectBackward0>)
        """
        check_tensor("offset", offset)
        expected = [self.group, self._taps, self.spatial_dims]
        if offset.dim() != self.spatial_dims + 4 or list(offset.shape[-3:]) != expected:
            raise ValueError(
                f"offset has shape {list(offset.shape)}; it must have {self.spatial_dims + 4} axes, "
                f"the last three of {times(expected)} = groups x taps x coordinates"
            )
        window = (self.kernel_size, self.stride, self.pad, self.dilation)
        base, shift = points(offset.to(compute_dtype(offset.dtype)), *window, self.offset_scale, self.remove_center)
        return base + shift

    def extra_repr(self) -> str:
        """The numbers of channels and groups, the window, and the arguments that are not at their defaults."""
        text = f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, pad={self.pad}"
        text += f", group={self.group}"
        if max(self.dilation) > 1:
            text += f", dilation={self.dilation}"
        if self.offset_scale != 1:
            text += f", offset_scale={self.offset_scale}"
        for name in ("center_feature_scale", "remove_center"):
            if getattr(self, name):
                text += f", {name}=True"
        return text

    def _add_center_feature_scale(self, **factory: Any) -> None:
        # Parameters instead of a Linear, for the names of the published state-dicts.
        if self.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(self.group, self.channels, **factory))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(self.group, **factory))

    def _depthwise(self, kernel_size: tuple[int, ...], **factory: Any) -> nn.Module:
        padding = tuple(k // 2 for k in kernel_size)
        channels = self.channels
        conv = _CONV[self.spatial_dims]
        return conv(channels, channels, kernel_size, padding=padding, groups=channels, **factory)

    def _check_input(self, input: Tensor) -> None:
        check_tensor("input", input)
        axes = self.spatial_dims + 2
        if input.dim() != axes:
            raise ValueError(f"input has shape {list(input.shape)}; it must have {axes} axes, the channels last")
        if input.shape[-1] != self.channels:
            first = "; channels come last here: input.movedim(1, -1)" if input.shape[1] == self.channels else ""
            raise ValueError(f"input has {input.shape[-1]} channels; this layer has channels={self.channels}{first}")
        self._out_size(input)

    def _out_size(self, input: Tensor) -> list[int]:
        window = (self.kernel_size, self.stride, self.pad, self.dilation)
        return checked_output_size("input", input.shape[1:-1], *window)

    def _at_centres(self, field: Tensor) -> Tensor:
        """``field [N, *S, C]`` at the centre of each window, or the nearest element to it: ``[N, *out, C]``."""
        for axis, out in enumerate(self._out_size(field), 1):
            k, s, p, d = (steps[axis - 1] for steps in (self.kernel_size, self.stride, self.pad, self.dilation))
            if s > 1 or 2 * p != d * (k - 1):
                index = torch.arange(out, device=field.device) * s - p + d * (k - 1) // 2
                field = field.index_select(axis, index.clamp(0, field.shape[axis] - 1))
        return field

    def _aggregate(self, value: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.pad, self.dilation)
        by_group = value.unflatten(-1, (self.group, -1))
        options: dict[str, Any] = {"offset_scale": self.offset_scale, "remove_center": self.remove_center}
        return deform_aggregate(by_group, offset, mask, *window, **options).flatten(-2)

    def _blend(self, aggregated: Tensor, value: Tensor, query: Tensor) -> Tensor:
        """Mix in the value at the centre of the window, by a share for each group that ``query`` gives."""
        if not self.center_feature_scale:
            return aggregated
        share = F.linear(query, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias).sigmoid()
        share = share.repeat_interleave(self.channels // self.group, -1)
        return aggregated * (1 - share) + self._at_centres(value) * share

    def _reset(self, *, zero: Sequence[nn.Module], xavier: Sequence[nn.Module]) -> None:
        for module in self.modules():
            if isinstance(module, _ConvNd | _NormBase | nn.LayerNorm):
                module.reset_parameters()
        for module in zero:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        for module in xavier:
            for name, parameter in module.named_parameters():
                if name == "weight":
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)


class DCNv3(_DCN):
    """The layer of InternImage: deformable aggregation with a softmax over the taps, for tensors with channels last.

    The layer computes ``features = activation(norm(depthwise_convolution(input)))`` at the centre of each window. For
    each group, ``offset = offset_head(features)`` and ``mask = softmax over taps of mask_head(features)``. Then

    ``output = output_proj(deform_aggregate(input_proj(input), offset, mask))``

    With ``center_feature_scale`` the projected input at the centre of the window is blended in with the factor
    ``s = sigmoid(linear(features))`` of each group: ``aggregated * (1-s) + input_proj(input) * s``.

    The arguments and the entries of the state-dict have the published names. The values of a published state-dict are
    in another order of taps and coordinates; see :func:`deformkit.nn.dcnv3_state_dict`.

    If ``stride`` is not 1 or ``pad`` does not keep the size, the features are computed at all positions of the input
    and taken at ``stride*o - pad + centre`` with ``centre = dilation*(kernel_size-1) // 2``. The published layer is
    undefined in these cases.

    Args:
        channels: C, channels of the input and of the output.
        kernel_size: number of taps along each axis; K in total, or one less with ``remove_center``.
        dw_kernel_size: kernel size of the depthwise convolution, which must be odd; None: ``kernel_size``.
        stride: step of the output positions, in pixels.
        pad: distance of the first tap from the edge of the input, in pixels.
        dilation: distance between two taps, in pixels.
        group: number of groups of channels; each has its own offsets and masks.
        offset_scale: factor that scales the distance of each point from the centre of its window.
        act_layer: ``"GELU"``, ``"SiLU"`` or ``"ReLU"``.
        norm_layer: ``"LN"`` (over the channels) or ``"BN"``.
        center_feature_scale: whether to blend in the centre; see above.
        remove_center: whether to leave out the middle tap; every kernel size must be odd.
        spatial_dims: number of spatial axes, 1, 2 or 3.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shapes: ``input [N, *S, C]``, output ``[N, *out, C]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DCNv3(64, group=4)
        >>> layer(torch.randn(2, 20, 30, 64)).shape
        torch.Size([2, 20, 30, 64])

    Paper: InternImage, https://arxiv.org/abs/2211.05778.
    """

    @_with_hints
    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | Sequence[int] = 3,
        dw_kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: Literal["GELU", "SiLU", "ReLU"] = "GELU",
        norm_layer: Literal["LN", "BN"] = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        spatial_dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        window = (kernel_size, stride, pad, dilation, group, offset_scale, dw_kernel_size)
        super().__init__(channels, *window, center_feature_scale, remove_center, spatial_dims)
        check_choice("act_layer", act_layer, list(_ACTIVATION))
        check_choice("norm_layer", norm_layer, ("LN", "BN"))
        assert self.dw_kernel_size is not None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: list[nn.Module] = [_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6, **factory)]
        if norm_layer == "BN":
            norm = [_BATCH_NORM[spatial_dims](channels, **factory), _ChannelsLast()]
        depthwise = self._depthwise(self.dw_kernel_size, **factory)
        self.dw_conv = nn.Sequential(depthwise, nn.Sequential(*norm), _ACTIVATION[act_layer]())
        self.offset = nn.Linear(channels, group * self._taps * spatial_dims, **factory)
        self.mask = nn.Linear(channels, group * self._taps, **factory)
        self.input_proj = nn.Linear(channels, channels, **factory)
        self.output_proj = nn.Linear(channels, channels, **factory)
        self._add_center_feature_scale(**factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the heads to zero, so that offsets are 0 and weights 1/K, and the other layers at random."""
        self._reset(zero=(self.offset, self.mask), xavier=(self.input_proj, self.output_proj))

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the offsets ``[N, *out, group, K, spatial_dims]`` and masks ``[N, *out, group, K]`` for an input."""
        self._check_input(input)
        return self._heads(self._features(input))

    def forward(self, input: Tensor) -> Tensor:
        """Compute the output ``[N, *out, C]`` for an input ``[N, *S, C]``."""
        self._check_input(input)
        value, features = linear(self.input_proj, input), self._features(input)
        aggregated = self._aggregate(value, *self._heads(features))
        return linear(self.output_proj, self._blend(aggregated, value, features))

    def _features(self, input: Tensor) -> Tensor:
        return self._at_centres(self.dw_conv(input.movedim(-1, 1)))

    def _heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        offset = linear(self.offset, features).unflatten(-1, (self.group, self._taps, self.spatial_dims))
        return offset, linear(self.mask, features).unflatten(-1, (self.group, self._taps)).softmax(-1)


class DCNv4(_DCN):
    """The layer of FlashInternImage: :class:`DCNv3` without softmax, with offsets and masks from one linear layer.

    The layer computes ``offset, mask = offset_mask(input)`` at the centre of each window; with ``dw_kernel_size``, a
    depthwise convolution is applied to ``input`` before. Then

    ``output = output_proj(deform_aggregate(value_proj(input), offset, mask))``

    The output of ``offset_mask`` contains the K*N offsets and then the K masks of each group. Unused channels after the
    last group make the number of channels a multiple of 8. With ``center_feature_scale`` the projected input at the
    centre of the window is blended in with the factor ``s = sigmoid(linear(aggregated))`` of each group:
    ``aggregated * (1-s) + value_proj(input) * s``.

    The arguments and the entries of the state-dict have the published names. The values of a published state-dict are
    in another order of taps and coordinates; see :func:`deformkit.nn.dcnv4_state_dict`. The masks are initialised to
    zero, so that a new layer returns the bias of its ``output_proj``.

    Args:
        channels: C, channels of the input and of the output. Parameters that are not described here are as in
            :class:`DCNv3`.
        dw_kernel_size: kernel size of a depthwise convolution before ``offset_mask``, which must be odd; None: there is
            no such convolution.
        output_bias: whether ``output_proj`` has a bias.
        without_pointwise: whether to leave out ``value_proj`` and ``output_proj``.

    Shapes: ``input [N, *S, C]``, output ``[N, *out, C]``; or flat, ``input [N, L, C]`` with
    ``forward(input, shape=S)``, output ``[N, Lout, C]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DCNv4(64, group=4)
        >>> layer(torch.randn(2, 20, 30, 64)).shape
        torch.Size([2, 20, 30, 64])
        >>> layer(torch.randn(2, 600, 64), shape=(20, 30)).shape
        torch.Size([2, 600, 64])

    Paper: DCNv4, https://arxiv.org/abs/2401.06197.
    """

    @_with_hints
    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | Sequence[int] | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        spatial_dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        window = (kernel_size, stride, pad, dilation, group, offset_scale, dw_kernel_size)
        super().__init__(channels, *window, center_feature_scale, remove_center, spatial_dims)
        self.without_pointwise = without_pointwise
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.dw_kernel_size is not None:
            self.offset_mask_dw = self._depthwise(self.dw_kernel_size, **factory)
        predicted = group * self._taps * (spatial_dims + 1)
        self.offset_mask = nn.Linear(channels, -(-predicted // 8) * 8, **factory)
        if not without_pointwise:
            self.value_proj = nn.Linear(channels, channels, **factory)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias, **factory)
        self._add_center_feature_scale(**factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the head to zero, so that offsets and masks are 0, and the other layers at random."""
        pointwise = () if self.without_pointwise else (self.value_proj, self.output_proj)
        self._reset(zero=(self.offset_mask,), xavier=pointwise)

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the offsets ``[N, *out, group, K, spatial_dims]`` and masks ``[N, *out, group, K]`` for an input."""
        self._check_input(input)
        features = input
        if self.dw_kernel_size is not None:
            features = self.offset_mask_dw(input.movedim(-1, 1)).movedim(1, -1)
        packed = linear(self.offset_mask, self._at_centres(features))
        offsets = self._taps * self.spatial_dims
        used = packed[..., : self.group * (offsets + self._taps)].unflatten(-1, (self.group, -1))
        return used[..., :offsets].unflatten(-1, (self._taps, self.spatial_dims)), used[..., offsets:]

    def forward(self, input: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Compute ``[N, *out, C]`` from ``[N, *S, C]``, or a flat output from a flat input with ``shape`` S."""
        check_tensor("input", input)
        size = None if shape is None else ntuple(shape, self.spatial_dims, "shape", 1)
        if input.dim() == 3 and self.spatial_dims > 1:
            if size is None:
                raise ValueError(f"shape is None; an input of {list(input.shape)} needs the sizes of its spatial axes")
            if input.shape[1] != prod(size):
                raise ValueError(f"input has {input.shape[1]} positions; shape {times(size)} has {prod(size)}")
            return self.forward(input.unflatten(1, size)).flatten(1, -2)
        self._check_input(input)
        if size is not None and size != list(input.shape[1:-1]):
            raise ValueError(f"shape is {times(size)}; input has spatial size {times(input.shape[1:-1])}")

        value = input if self.without_pointwise else linear(self.value_proj, input)
        aggregated = self._aggregate(value, *self.predict(input))
        output = self._blend(aggregated, value, aggregated)
        return output if self.without_pointwise else linear(self.output_proj, output)


class _ChannelsLast(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input.movedim(1, -1)
