"""The layers of deformops 3.x."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

from torch import Tensor, nn

from ....nn._linear import linear
from ....ops._levels import SpatialShapes
from ....ops._shape import check_choice
from ...torchvision import DeformConv2d as _DeformConv2d
from .._attention import MultiScale
from .._sampling import Project, Sampling, ScaleLinear, project, reset_projections

__all__ = ["DeformAttn2d", "DeformConv2d", "DeformSample2d", "MSDAMethod", "MultiScaleDeformAttn2d"]


class MSDAMethod(str, Enum):
    """How weights are made of what a layer predicts: as it is, or a softmax over the points."""

    LINEAR = "linear"
    SOFTMAX = "softmax"


class DeformConv2d(_DeformConv2d):
    """:class:`deformkit.compat.torchvision.DeformConv2d`; ``backend`` has no meaning here.

    Example:
        >>> import torch
        >>> layer = DeformConv2d(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 8, 20, 30), torch.zeros(2, 18, 20, 30)).shape
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
        bias: bool = True,
        backend: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


class DeformAttn2d(Sampling):
    """Deformable aggregation of a value, with offsets and masks that a query predicts.

    ``offset, mask = proj_offset_mask(q)``; then

    ``output = activation(norm(proj_output(deform_aggregate(proj_value(v), offset, mask))))``

    With ``center_gate`` a share ``s = sigmoid(linear(aggregated))`` of each group is the projected value at the centre
    of the window. The names of the parameters, and the layout of the head, are those of deformops 3.x.

    Args:
        dim: C, channels of query, value and output; any multiple of ``groups``.
        kernel_size: number of taps along each axis.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the value, in pixels; ``"same"``:
            ``dilation*(kernel_size-1)//2``.
        dilation: distance between two taps, in pixels.
        groups: number of groups of channels; each has its own offsets and masks.
        spread: factor that scales the distance of each point from the centre of its window.
        center_gate: whether to blend in the centre, see above; for odd kernels.
        drop_center: whether to leave out the middle tap; for odd kernels.
        project: makes ``proj_value`` and ``proj_output`` as ``project(dim, dim)``; None: there are none.
        method: ``"linear"``: masks as predicted; ``"softmax"``: a softmax over the taps of a group.
        backend: has no effect.
        norm: applied to the output in its own layout, or None.
        activation: applied after the norm, or None.

    Shapes of ``forward(q, v, shape=None)``: ``q [N, C, Hout, Wout]`` or tokens ``[N, Hout*Wout, C]``;
    ``v [N, C, H, W]`` or tokens ``[N, H*W, C]`` with ``shape=(H, W)``; output as ``q``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformAttn2d(16, stride=2)
        >>> layer(torch.randn(2, 16, 10, 15), torch.randn(2, 16, 20, 30)).shape
        torch.Size([2, 16, 10, 15])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same"] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 4,
        spread: float = 1.0,
        center_gate: bool = False,
        drop_center: bool = False,
        project: Project | None = nn.Linear,
        method: MSDAMethod | Literal["linear", "softmax"] = "linear",
        backend: Any = None,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        check_choice("method", method, ("linear", "softmax"))
        window = (kernel_size, stride, padding, dilation, groups, spread)
        super().__init__("dim", dim, *window, center_gate, drop_center, method == "softmax")
        if center_gate and any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size is {kernel_size!r}; with center_gate it must be odd")
        self.proj_offset_mask = nn.Linear(dim, self._head_size())
        self.proj_value = None if project is None else project(dim, dim)
        self.proj_output = None if project is None else project(dim, dim)
        self.center_scale = ScaleLinear(dim, groups) if center_gate else None
        self.norm, self.activation = norm, activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the head to zero, so that offsets and masks are 0; draw the projections."""
        for parameter in self.proj_offset_mask.parameters():
            nn.init.zeros_(parameter)
        reset_projections(self.proj_value, self.proj_output)

    def predict(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The offsets ``[N, *out, groups, K, 2]`` and the masks ``[N, *out, groups, K]`` for a query ``[N, C, *out]``.

        Both are in the order of :func:`deformkit.deform_aggregate`: taps in row-major order, coordinates (h, w).
        """
        return self._points(linear(self.proj_offset_mask, self._channels_last("q", q, None, "")))

    def forward(self, q: Tensor, v: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """What ``q`` reads of ``v``, in the layout of ``q``."""
        field = self._channels_last("v", v, shape, "shape is")
        query = self._channels_last("q", q, self._out_size(field), "with this v the output has")
        return self._sample(project(self.proj_value, field), linear(self.proj_offset_mask, query), q.dim() == 3)

    def _split(self, head: Tensor) -> tuple[Tensor, Tensor]:
        by_tap = head.unflatten(-1, (-1, 3))
        return by_tap[..., :2], by_tap[..., 2]


class DeformSample2d(nn.Module):
    """:class:`DeformAttn2d` whose query is a depthwise convolution, ``offset``, of the value itself.

    Args:
        dim: this and all others as in :class:`DeformAttn2d`.
        kernel_size: also of the depthwise convolution, as are stride, padding and dilation.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        spread: see there.
        center_gate: see there.
        drop_center: see there.
        project: see there.
        method: see there.
        backend: has no meaning here.
        norm: see there.
        activation: see there.

    Shapes of ``forward(input, shape=None)``: ``input [N, C, H, W]``, output ``[N, C, Hout, Wout]``; or tokens
    ``[N, H*W, C]`` with ``shape=(H, W)``, output ``[N, Hout*Wout, C]``.

    Example:
        >>> import torch
        >>> DeformSample2d(16, 5, stride=2)(torch.randn(2, 16, 20, 30)).shape
        torch.Size([2, 16, 10, 15])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same"] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 4,
        spread: float = 1.0,
        center_gate: bool = False,
        drop_center: bool = False,
        project: Project | None = nn.Linear,
        method: MSDAMethod | Literal["linear", "softmax"] = "linear",
        backend: Any = None,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        rest: dict[str, Any] = {"spread": spread, "center_gate": center_gate, "drop_center": drop_center}
        rest |= {"project": project, "method": method, "norm": norm, "activation": activation}
        sample = DeformAttn2d(dim, kernel_size, **window, groups=groups, **rest)
        window = {"stride": sample.stride, "padding": sample.pad, "dilation": sample.dilation}
        window["kernel_size"] = sample.kernel_size
        self.offset = nn.Conv2d(dim, dim, **window, groups=dim)
        self.sample = sample
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the depthwise convolution; ``sample`` draws its own."""
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
        nn.init.kaiming_normal_(self.offset.weight, a=1)

    def forward(self, input: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Compute the output for an input, in its layout."""
        field = self.sample._channels_last("input", input, shape, "shape is")
        query = self.offset(field.movedim(-1, 1))
        if input.dim() == 3:
            query = query.flatten(2).transpose(1, 2)
        return self.sample(query, input, shape)


class MultiScaleDeformAttn2d(MultiScale):
    """Multi-scale deformable attention: every query predicts and samples a few points on every level of a pyramid.

    :class:`deformkit.nn.MSDeformAttn` with the parameter names of deformops 3.x, widths of its own for value and
    output, and a choice of how points are weighed. A state-dict with the names of Deformable DETR is loaded as well.

    Args:
        dim: width of queries, divisible by ``num_heads``.
        dim_value: width of ``v``; None: ``dim``.
        dim_output: width of the output; None: ``dim``.
        num_heads: H.
        num_levels: L, levels of the pyramid.
        num_points: P, points of one head on one level.
        method: ``"softmax"`` over the L*P points of a head; ``"linear"``: as predicted.
        backend: has no meaning here.
        chunk_step: has no meaning here.

    Shapes of ``forward(q, p, v, spatial_shapes, level_start_index, padding_mask=None)``: as those of
    :class:`deformkit.compat.deformops.nn.DeformAttn2d`, where ``spatial_shapes`` are ``shapes`` and
    ``level_start_index`` is ``level_index``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = MultiScaleDeformAttn2d(64, num_heads=4, num_levels=2)
        >>> pyramid, shapes = torch.randn(2, 32 * 48 + 16 * 24, 64), torch.tensor([[32, 48], [16, 24]])
        >>> layer(torch.randn(2, 100, 64), torch.rand(2, 100, 2, 2), pyramid, shapes, torch.tensor([0, 1536])).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        dim_value: int | None = None,
        dim_output: int | None = None,
        *,
        num_heads: int,
        num_levels: int,
        num_points: int = 4,
        method: MSDAMethod | Literal["linear", "softmax"] = "softmax",
        backend: Any = None,
        chunk_step: int = 128,
    ) -> None:
        super().__init__(dim, dim_value, dim_output, num_heads, num_levels, num_points)
        check_choice("method", method, ("linear", "softmax"))
        self.method = MSDAMethod(method)
        self.register_load_state_dict_pre_hook(_rename_deformable_detr)

    def forward(
        self,
        q: Tensor,
        p: Tensor,
        v: Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the output for every query; see the class for shapes."""
        return self._attend(q, p, v, "spatial_shapes", spatial_shapes, level_start_index, padding_mask)

    def _weigh(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.method == MSDAMethod.SOFTMAX else logits


_OF_DEFORMABLE_DETR = {
    "sampling_offsets": "proj_offset",
    "attention_weights": "proj_weights",
    "value_proj": "proj_value",
    "output_proj": "proj_output",
}


def _rename_deformable_detr(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for published, name in _OF_DEFORMABLE_DETR.items():
        for kind in ("weight", "bias"):
            key = f"{prefix}{published}.{kind}"
            if key in state_dict:
                state_dict[f"{prefix}{name}.{kind}"] = state_dict.pop(key)
