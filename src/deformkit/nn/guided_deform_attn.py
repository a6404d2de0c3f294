"""Guided deformable attention: a frame attends to points of other frames that a flow and learned offsets give."""

from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._shape import check_alike, check_count, check_floating, check_tensor, compute_dtype, ntuple
from ..ops.deform_correlate.op import deform_correlate
from ..ops.deform_sample.op import deform_sample
from ..ops.ms_deform_attn.op import ms_deform_attn
from ..ops.sample.reference import tap_grid
from ._field import check_field, positions
from ._linear import linear

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class GuidedDeformAttn(nn.Module):
    """Guided deformable attention of RVRT: alignment of frames by attention at points around the flow.

    ``output[b, h, o] = sum over t, k of softmax over t, k(q[b, h, o] . K_t(p) / sqrt(D)) * V_t(p)``,
    ``p[b, h, t, k, o] = o + tap(k) + flow[b, t, o] + offset[b, h, t, k, o]``

    where ``q``, ``K_t`` and ``V_t`` are projections of ``input`` and of the frames of ``source``, sampled as in
    :func:`deformkit.ms_deform_attn`, and ``tap(k)`` are the taps of a kernel around 0. The offsets are ``max_offset *
    tanh`` of two convolutions over the input, the frame warped by its flow, and the flow; they start at 0. A final
    projection mixes the heads. Memory grows with the number of points, not with points times channels.

    Args:
        dim: C, channels of both inputs and of the output.
        heads: H, number of heads of ``D = dim / heads`` channels, each with offsets of its own.
        kernel_size: number of points along each axis; K in total.
        max_offset: largest offset, in pixels.
        bias: whether the projections have a bias.
        spatial_dims: N, 1 to 3.

    Shapes of ``forward(input, source, flow)``:
        ``input [B, C, *S]``; ``source [B, T, C, *S]``, T frames; ``flow [B, T, N, *S]`` in pixels, in tensor-axis order
        (h, w), from each pixel of ``input`` to its place in the frame. Output ``[B, C, *S]``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = GuidedDeformAttn(32, heads=4)
        >>> frame, others = torch.randn(1, 32, 16, 20), torch.randn(1, 2, 32, 16, 20)
        >>> layer(frame, others, flow=torch.randn(1, 2, 2, 16, 20)).shape
        torch.Size([1, 32, 16, 20])

    Paper: Recurrent Video Restoration Transformer, https://arxiv.org/abs/2206.02146.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        kernel_size: int | tuple[int, ...] = 3,
        max_offset: float = 10.0,
        bias: bool = True,
        *,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("heads", heads)
        if dim % heads:
            raise ValueError(f"dim is {dim}; it must be divisible by heads, which is {heads}")
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it must be 1, 2 or 3")
        if not max_offset > 0:
            raise ValueError(f"max_offset is {max_offset}; it must be positive")
        self.dim, self.heads, self.max_offset, self.spatial_dims = dim, heads, max_offset, spatial_dims
        self.kernel_size = tuple(ntuple(kernel_size, spatial_dims, "kernel_size", 1))
        conv, points = _CONVS[spatial_dims], heads * prod(self.kernel_size)
        self.offset_head = nn.Sequential(
            conv(2 * dim + spatial_dims, dim, 3, padding=1),
            nn.LeakyReLU(0.1),
            conv(dim, points * spatial_dims, 3, padding=1),
        )
        self.query_proj, self.key_proj, self.value_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.output_proj = nn.Linear(dim, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the offsets start at 0."""
        for parameter in self.offset_head[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor, source: Tensor, flow: Tensor) -> Tensor:
        """Attend from ``input`` to the frames of ``source`` along ``flow``."""
        self._check(input, source, flow)
        size, frames = input.shape[2:], source.shape[1]
        points = self.sampling_points(input, source, flow)
        locations = ((points + 0.5) / points.new_tensor(list(size))).flip(-1)

        tokens = source.flatten(3).transpose(2, 3).flatten(1, 2)
        query = linear(self.query_proj, input.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1))
        key, value = (
            linear(layer, tokens).unflatten(-1, (self.heads, -1)) for layer in (self.key_proj, self.value_proj)
        )
        levels = [tuple(size)] * frames
        # The query has fewer elements than the scores.
        scores = deform_correlate(query / sqrt(self.dim // self.heads), key, levels, locations)
        weights = scores.flatten(3).softmax(-1).view_as(scores)
        output = linear(self.output_proj, ms_deform_attn(value, levels, locations, weights))
        return output.transpose(1, 2).unflatten(2, size)

    def sampling_points(self, input: Tensor, source: Tensor, flow: Tensor) -> Tensor:
        """The points ``p`` in pixels, ``[B, Q, H, T, K, N]`` in tensor-axis order, Q pixels in row-major order."""
        self._check(input, source, flow)
        axes, frames, size = self.spatial_dims, source.shape[1], list(input.shape[2:])
        dtype = compute_dtype(input.dtype)
        place = positions(size, dtype, input.device)
        aligned = place + flow.to(dtype).flatten(0, 1).movedim(1, -1)
        warped = deform_sample(source.flatten(0, 1), aligned.unsqueeze(1))
        repeated = input.unsqueeze(1).expand(-1, frames, *[-1] * (axes + 1)).flatten(0, 1)
        raw = self.offset_head(torch.cat([repeated, warped, flow.to(input.dtype).flatten(0, 1)], 1))
        offset = self.max_offset * raw.to(dtype).flatten(2).tanh()

        # From [B*T, H*K*N, Q].
        offset = offset.unflatten(1, (self.heads, -1, axes)).unflatten(0, (-1, frames)).permute(0, 5, 2, 1, 3, 4)
        centre = aligned.flatten(1, -2).unflatten(0, (-1, frames)).transpose(1, 2)[:, :, None, :, None]
        taps = tap_grid(
            self.kernel_size, [1] * axes, [1] * axes, [k // 2 for k in self.kernel_size], [1] * axes, input.device
        )
        return centre + taps.reshape(-1, axes) + offset

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.dim}, heads={self.heads}, kernel_size={self.kernel_size}, max_offset={self.max_offset}, "
            f"spatial_dims={self.spatial_dims}"
        )

    def _check(self, input: Tensor, source: Tensor, flow: Tensor) -> None:
        axes = self.spatial_dims
        check_field("input", input, [axes])
        if input.shape[1] != self.dim:
            raise ValueError(f"input has {input.shape[1]} channels; this layer has dim={self.dim}")
        check_alike("source", source, "input", input)
        check_tensor("flow", flow)
        check_floating("flow", flow)
        check_alike("flow", flow, "input", input, dtype=False)
        batch, _, *size = input.shape
        frames = source.shape[1] if source.dim() > 1 else 0
        for name, tensor, channels in (("source", source, self.dim), ("flow", flow, axes)):
            expected = [batch, frames, channels, *size]
            if list(tensor.shape) != expected or frames < 1:
                shown = [batch, frames or "T", channels, *size]
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}; with input of shape {list(input.shape)} it must be "
                    f"[{', '.join(map(str, shown))}]"
                )
