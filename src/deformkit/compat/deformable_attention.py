"""The layers of the package deformable-attention, of which all queries attend to a few positions that move."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn._field import check_field, positions
from ..ops._shape import check_count, compute_dtype, ntuple, times
from ..ops.deform_sample.op import deform_sample

__all__ = ["DeformableAttention1D", "DeformableAttention2D", "DeformableAttention3D"]

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _Scale(nn.Module):
    """Multiply each coordinate by its scale; the package keeps that of volumes in its state-dict."""

    scale: Tensor

    def __init__(self, scale: Sequence[float], persistent: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


class _PositionBias(nn.Module):
    """The continuous position bias: a network of the distance between a query and a key."""

    def __init__(self, dim: int, heads: int, offset_groups: int, axes: int, log_distance: bool) -> None:
        super().__init__()
        self.offset_groups, self.log_distance = offset_groups, log_distance
        self.mlp = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(axes, dim), nn.ReLU()),
                nn.Sequential(nn.Linear(dim, dim), nn.ReLU()),
                nn.Linear(dim, heads // offset_groups),
            ]
        )


class _DeformableAttention(nn.Module):
    axes: ClassVar[int]

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        downsample_factor: int | Sequence[int] = 4,
        offset_scale: float | Sequence[float] | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: int | Sequence[int] = 6,
        group_queries: bool = True,
        group_key_values: bool = True,
        cpb_log_distance: bool = True,
    ) -> None:
        super().__init__()
        axes, conv = self.axes, _CONVS[self.axes]
        groups = heads if offset_groups is None else offset_groups
        for name, count in {"dim": dim, "dim_head": dim_head, "heads": heads, "offset_groups": groups}.items():
            check_count(name, count)
        for name, number in (("heads", heads), ("dim", dim)):
            if number % groups:
                raise ValueError(f"{name} is {number}; it must be divisible by offset_groups, which is {groups}")
        factors = ntuple(downsample_factor, axes, "downsample_factor", 1)
        kernel = ntuple(offset_kernel_size, axes, "offset_kernel_size", 1)
        if any(k < f or (k - f) % 2 for k, f in zip(kernel, factors, strict=True)):
            raise ValueError(
                f"offset_kernel_size is {times(kernel)}; it must be larger than downsample_factor, "
                f"{times(factors)}, by 0 or an even number along each axis"
            )
        scale = factors if offset_scale is None else offset_scale
        scales = [float(s) for s in (scale if isinstance(scale, Sequence) else [scale] * axes)]
        if len(scales) != axes:
            raise ValueError(f"offset_scale is {offset_scale}; it must be a number or {axes} numbers")

        inner = dim_head * heads
        width = inner // groups
        self.heads, self.offset_groups, self.downsample_factor = heads, groups, downsample_factor
        padding = [(k - f) // 2 for k, f in zip(kernel, factors, strict=True)]
        self.to_offsets = nn.Sequential(
            conv(width, width, kernel, factors, padding, groups=width),
            nn.GELU(),
            conv(width, axes, 1, bias=False),
            nn.Tanh(),
            _Scale(scales, persistent=axes == 3),
        )
        self.rel_pos_bias = _PositionBias(max(dim // 4, 1), heads, groups, axes, cpb_log_distance)
        self.dropout = nn.Dropout(dropout)
        self.to_q = conv(dim, inner, 1, groups=groups if group_queries else 1, bias=False)
        self.to_k = conv(dim, inner, 1, groups=groups if group_key_values else 1, bias=False)
        self.to_v = conv(dim, inner, 1, groups=groups if group_key_values else 1, bias=False)
        self.to_out = conv(inner, dim, 1)

    def forward(self, x: Tensor, return_vgrid: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from every pixel of ``x``; see the class for shapes."""
        return _attend(self, x, return_vgrid)


class DeformableAttention1D(_DeformableAttention):
    """The layer ``DeformableAttention1D`` of deformable-attention 0.0.20; :class:`DeformableAttention2D` for sequences.

    Args:
        dim: as in :class:`DeformableAttention2D`, like all other arguments but the last.
        cpb_log_distance: whether the position bias is computed from the logarithms of the distances.

    Shapes: ``x [B, dim, L]``, ``vgrid [B*G, L / downsample_factor]``.

    Example:
        >>> import torch
        >>> DeformableAttention1D(dim=32, dim_head=8, heads=4)(torch.randn(1, 32, 64)).shape
        torch.Size([1, 32, 64])
    """

    axes = 1


class DeformableAttention2D(_DeformableAttention):
    """The layer ``DeformableAttention2D`` of deformable-attention 0.0.20.

    ``output = to_out(softmax(Q K^T / sqrt(dim_head) + B) V)``, with ``Q = to_q(x)`` and K and V from ``x`` sampled at
    a coarse grid of positions that move by ``offset_scale * tanh(offsets(Q))`` of its steps. B is the position bias.
    The arguments, the initialisation and the state-dict are those of the package. For the layer of deformkit, whose
    offsets are in pixels, see :class:`deformkit.nn.DeformableAttention`.

    Args:
        dim: channels of the input and the output.
        dim_head: channels of a head.
        heads: number of heads.
        dropout: probability with which a weight of the attention is set to 0 in training.
        downsample_factor: pixels for each key along an axis.
        offset_scale: largest offset, in steps of the grid of keys; ``downsample_factor`` by default.
        offset_groups: G, number of groups of channels with positions of their own; ``heads`` by default.
        offset_kernel_size: kernel of the convolution that predicts offsets, larger than ``downsample_factor`` by 0 or
            an even number.
        group_queries: whether the projection of queries has a group for each group of offsets.
        group_key_values: whether those of keys and values have.

    Shapes of ``forward(x, return_vgrid=False)``: ``x [B, dim, H, W]``, output ``[B, dim, H, W]``; with ``return_vgrid``
    also the moved grid ``[B*G, 2, H / downsample_factor, W / downsample_factor]``, x first, in steps of the grid.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformableAttention2D(dim=32, dim_head=8, heads=4, offset_groups=2)
        >>> layer(torch.randn(1, 32, 16, 24)).shape
        torch.Size([1, 32, 16, 24])

    Paper: Vision Transformer with Deformable Attention, https://arxiv.org/abs/2201.00520.
    """

    axes = 2


class DeformableAttention3D(_DeformableAttention):
    """The layer ``DeformableAttention3D`` of deformable-attention 0.0.20, with its errors corrected.

    The package samples its moved grid with the coordinates in reverse order, so that a position along the frames is
    read along the width; it does not accept a number as ``offset_kernel_size``, which is the default, or as
    ``offset_scale``; and the kernel must be larger than the factor. Here positions are sampled where they lie, and all
    these arguments are one number or three. The state-dict is the same, but a network that was trained with the
    package gives other outputs here.

    Args:
        dim: as in :class:`DeformableAttention2D`, like all other arguments.

    Shapes: ``x [B, dim, F, H, W]``, ``vgrid [B*G, 3, F / f, H / h, W / w]``, in tensor-axis order.

    Example:
        >>> import torch
        >>> layer = DeformableAttention3D(dim=32, dim_head=8, heads=4, downsample_factor=(2, 4, 4))
        >>> layer(torch.randn(1, 32, 4, 8, 12)).shape
        torch.Size([1, 32, 4, 8, 12])
    """

    axes = 3


# It reads nothing of a layer but what that of the package has: where that is patched, it is its forward.


def _attend(layer: Any, x: Tensor, return_vgrid: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    axes = layer.to_q.weight.dim() - 2
    check_field("x", x, [axes])
    if x.shape[1] != layer.to_out.weight.shape[0]:
        raise ValueError(f"x has {x.shape[1]} channels; this layer has dim={layer.to_out.weight.shape[0]}")
    queries, dtype, groups = layer.to_q(x), compute_dtype(x.dtype), layer.offset_groups
    offsets = layer.to_offsets(queries.unflatten(1, (groups, -1)).flatten(0, 1))
    # The package drops the axis of coordinates of sequences.
    offsets = offsets.unsqueeze(1) if offsets.dim() == 2 else offsets
    size, grid = list(x.shape[2:]), list(offsets.shape[2:])
    vgrid = offsets.to(dtype).movedim(1, -1) + _in_order(positions(grid, dtype, x.device))
    places = _normalised(vgrid, grid)
    extent = _in_order(vgrid.new_tensor(size))
    points = _in_order(((places + 1) * extent - 1) / 2).unflatten(0, (-1, groups))
    samples = deform_sample(x, points)
    query, key, value = (
        tensor.flatten(2).unflatten(1, (layer.heads, -1)).transpose(2, 3)
        for tensor in (queries, layer.to_k(samples), layer.to_v(samples))
    )
    ends = _normalised(_in_order(positions(size, dtype, x.device)), size)
    bias = _position_bias(layer.rel_pos_bias, ends.flatten(0, -2), places.flatten(1, -2), x.dtype)
    dropout = layer.dropout.p if layer.training else 0.0
    output = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout)
    output = layer.to_out(output.transpose(2, 3).flatten(1, 2).unflatten(2, size))
    if not return_vgrid:
        return output
    moved = vgrid.movedim(-1, 1)
    return output, moved.squeeze(1) if axes == 1 else moved


def _in_order(coordinates: Tensor) -> Tensor:
    """Between tensor-axis order and that of the package, which has x first for images alone."""
    return coordinates.flip(-1) if coordinates.shape[-1] == 2 else coordinates


def _normalised(grid: Tensor, size: Sequence[int]) -> Tensor:
    """From -1 to 1 over the grid. For images the package divides x by the height and y by the width."""
    return 2 * grid / grid.new_tensor([max(length - 1, 1) for length in size]) - 1


def _position_bias(network: Any, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, heads, Q, K]`` from queries ``[Q, N]`` and keys ``[B*G, K, N]``."""
    distance = queries.unsqueeze(1) - keys.unsqueeze(1)
    if getattr(network, "log_distance", True):
        distance = distance.sign() * distance.abs().log1p()
    bias = distance.to(dtype)
    for layer in network.mlp:
        bias = layer(bias)
    return bias.unflatten(0, (-1, network.offset_groups)).movedim(-1, 2).flatten(1, 2)
