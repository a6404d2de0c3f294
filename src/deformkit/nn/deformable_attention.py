"""Deformable attention of vision transformers: all queries attend to a few positions that move with the input."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._shape import check_count, compute_dtype, times
from ..ops.deform_sample.op import deform_sample
from ._field import check_field, positions

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class DeformableAttention(nn.Module):
    """Attention to a coarse grid of keys whose positions are predicted from the input and shared by all queries.

    ``output = softmax(Q K^T / sqrt(D) + B) V``, with ``Q`` from ``input`` and ``K``, ``V`` from ``sample(input, p)``,
    ``p[b, g, j] = r*j + (r - 1)/2 + max_offset * tanh(offset_head(Q)[b, g, j])``

    where j are the positions of the grid, one for every block of r pixels on each axis, and B is the continuous
    position bias: a small network of ``sign(d) * log(1 + |d|)`` for the distance d, in pixels, of a query to a key. The
    offset head is a convolution with stride r over the channels of a group and a linear layer, which starts at 0.

    Args:
        dim: C, channels of the input and of the output.
        heads: number of heads, of ``D = dim / heads`` channels.
        offset_groups: G, number of groups of channels with positions of their own; divides ``heads``.
        downsample_factor: r, pixels for each key along every axis.
        spatial_dims: N, 1 to 3.
        kernel_size: kernel of the offset head, at least r and even if r is, so that a block lies at its middle; r + 2
            by default, for r > 1, else 3.
        max_offset: largest offset, in pixels; r by default.
        position_bias: whether to add B.

    Shapes of ``forward(input)``: ``input [B, C, *S]``, output ``[B, C, *S]``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformableAttention(64, heads=4, offset_groups=2, downsample_factor=4)
        >>> layer(torch.randn(1, 64, 16, 24)).shape
        torch.Size([1, 64, 16, 24])
        >>> layer.sampling_points(torch.randn(1, 64, 16, 24)).shape
        torch.Size([1, 2, 4, 6, 2])

    Papers: Vision Transformer with Deformable Attention, https://arxiv.org/abs/2201.00520; the bias is that of
    CrossFormer and Swin Transformer V2, https://arxiv.org/abs/2111.09883.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        offset_groups: int = 1,
        downsample_factor: int = 4,
        spatial_dims: int = 2,
        *,
        kernel_size: int | None = None,
        max_offset: float | None = None,
        position_bias: bool = True,
    ) -> None:
        super().__init__()
        counts = {"dim": dim, "heads": heads, "offset_groups": offset_groups, "downsample_factor": downsample_factor}
        for name, count in counts.items():
            check_count(name, count)
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it must be 1, 2 or 3")
        for name, divisor in (("dim", "heads"), ("heads", "offset_groups")):
            if counts[name] % counts[divisor]:
                raise ValueError(
                    f"{name} is {counts[name]}; it must be divisible by {divisor}, which is {counts[divisor]}"
                )
        factor = downsample_factor
        kernel = (factor + 2 if factor > 1 else 3) if kernel_size is None else kernel_size
        check_count("kernel_size", kernel, factor)
        if (kernel - factor) % 2:
            raise ValueError(
                f"kernel_size is {kernel}; it must differ from downsample_factor, {factor}, by an even number"
            )
        self.dim, self.heads, self.offset_groups = dim, heads, offset_groups
        self.downsample_factor, self.spatial_dims = factor, spatial_dims
        self.max_offset = float(factor) if max_offset is None else max_offset
        if not self.max_offset > 0:
            raise ValueError(f"max_offset is {max_offset}; it must be positive")

        conv, channels = _CONVS[spatial_dims], dim // offset_groups
        self.query_proj, self.key_proj, self.value_proj, self.output_proj = (conv(dim, dim, 1) for _ in range(4))
        self.offset_head = nn.Sequential(
            conv(channels, channels, kernel, factor, (kernel - factor) // 2, groups=channels),
            nn.GELU(),
            conv(channels, spatial_dims, 1),
        )
        hidden = max(dim // 4, 1)
        self.bias_head = (
            nn.Sequential(nn.Linear(spatial_dims, hidden), nn.ReLU(), nn.Linear(hidden, heads // offset_groups))
            if position_bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the offsets start at 0."""
        for parameter in self.offset_head[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Attend from every pixel of ``input`` to the keys."""
        self._check(input)
        queries = self.query_proj(input)
        points = self._points(queries, input)
        samples = deform_sample(input, points)
        query, key, value = (
            tensor.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
            for tensor in (queries, self.key_proj(samples), self.value_proj(samples))
        )
        bias = None if self.bias_head is None else self._bias(points, input).to(query.dtype)
        output = F.scaled_dot_product_attention(query, key, value, bias)
        return self.output_proj(output.transpose(2, 3).flatten(1, 2).unflatten(2, input.shape[2:]))

    def sampling_points(self, input: Tensor) -> Tensor:
        """The positions ``p`` of the keys in pixels, ``[B, G, *grid, N]`` in tensor-axis order."""
        self._check(input)
        return self._points(self.query_proj(input), input)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.dim}, heads={self.heads}, offset_groups={self.offset_groups}, "
            f"downsample_factor={self.downsample_factor}, spatial_dims={self.spatial_dims}"
        )

    def _check(self, input: Tensor) -> None:
        check_field("input", input, [self.spatial_dims])
        if input.shape[1] != self.dim:
            raise ValueError(f"input has {input.shape[1]} channels; this layer has dim={self.dim}")
        if min(input.shape[2:]) < self.downsample_factor:
            raise ValueError(
                f"input has spatial size {times(input.shape[2:])}; with downsample_factor={self.downsample_factor} "
                "every axis needs at least as many elements"
            )

    def _points(self, queries: Tensor, input: Tensor) -> Tensor:
        dtype, factor = compute_dtype(input.dtype), self.downsample_factor
        raw = self.offset_head(queries.unflatten(1, (self.offset_groups, -1)).flatten(0, 1))
        offset = self.max_offset * raw.to(dtype).tanh().unflatten(0, (-1, self.offset_groups)).movedim(2, -1)
        return positions(raw.shape[2:], dtype, input.device) * factor + (factor - 1) / 2 + offset

    def _bias(self, points: Tensor, input: Tensor) -> Tensor:
        """``[B, heads, Q, K]``."""
        assert self.bias_head is not None
        queries = positions(input.shape[2:], points.dtype, points.device).flatten(0, -2)
        distance = queries.unsqueeze(1) - points.flatten(2, -2).unsqueeze(2)
        scaled = distance.sign() * distance.abs().log1p()
        return self.bias_head(scaled.to(input.dtype)).movedim(-1, 2).flatten(1, 2)
