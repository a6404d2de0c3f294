"""Multi-scale deformable attention with the names of deformops, which both of its releases share."""

from typing import Any

import torch
from torch import Tensor, nn

from ...nn._linear import linear
from ...nn.ms_deform_attn import _directions, point_locations
from ...ops._levels import SpatialShapes, level_sizes
from ...ops._shape import check_count, check_tensor
from .._attention import attend


class MultiScale(nn.Module):
    """The parameters, the locations and the call of the operator; a subclass defines the weights of the points."""

    def __init__(
        self, dim: int, dim_value: int | None, dim_output: int | None, num_heads: int, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        counts = {"dim": dim, "num_heads": num_heads, "num_levels": num_levels, "num_points": num_points}
        for name, count in counts.items():
            check_count(name, count)
        if dim % num_heads:
            raise ValueError(f"dim is {dim}; it must be divisible by num_heads, which is {num_heads}")
        self.dim, self.num_heads, self.num_levels, self.num_points = dim, num_heads, num_levels, num_points
        points = num_heads * num_levels * num_points
        self.proj_offset = nn.Linear(dim, points * 2)
        self.proj_weights = nn.Linear(dim, points)
        self.proj_value = nn.Linear(dim_value or dim, dim)
        self.proj_output = nn.Linear(dim, dim_output or dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections at random, and the points around the reference point with equal weights."""
        steps = torch.arange(1.0, self.num_points + 1).repeat(self.num_levels)
        with torch.no_grad():
            self.proj_offset.bias.copy_((_directions(self.num_heads, 2)[:, None] * steps[:, None]).flatten())
        for parameter in (self.proj_offset.weight, *self.proj_weights.parameters()):
            nn.init.zeros_(parameter)
        for projection in (self.proj_value, self.proj_output):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        """The arguments."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in ("dim", "num_heads", "num_levels", "num_points"))

    def _weigh(self, logits: Tensor) -> Tensor:
        """The weights of the points ``[B, Q, H, L*P]``."""
        raise NotImplementedError

    def _attend(
        self,
        q: Tensor,
        p: Tensor,
        v: Tensor,
        shapes_name: str,
        spatial_shapes: SpatialShapes,
        level_start_index: Any,
        padding_mask: Tensor | None,
    ) -> Tensor:
        for name, tensor, width in (("q", q, self.dim), ("v", v, self.proj_value.in_features)):
            check_tensor(name, tensor)
            if tensor.dim() != 3 or tensor.shape[2] != width:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have 3 axes, the last of {width}")
        if v.shape[0] != q.shape[0]:
            raise ValueError(f"v has batch size {v.shape[0]}; q has {q.shape[0]}")
        sizes = level_sizes(shapes_name, spatial_shapes, 2, "it must have 2, h and w")
        if len(sizes) != self.num_levels:
            raise ValueError(f"{shapes_name} has {len(sizes)} levels; this layer has num_levels={self.num_levels}")
        locations = self._locations(q, p, sizes)
        weights = self._weigh(linear(self.proj_weights, q).unflatten(-1, (self.num_heads, -1)))
        value = linear(self.proj_value, v)
        if padding_mask is not None:
            check_tensor("padding_mask", padding_mask)
            if padding_mask.dtype != torch.bool or padding_mask.shape != v.shape[:2]:
                raise ValueError(
                    f"padding_mask has shape {list(padding_mask.shape)} and dtype {padding_mask.dtype}; "
                    f"it must be {list(v.shape[:2])} and torch.bool"
                )
            value = value.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        by_head = value.unflatten(-1, (self.num_heads, -1))
        by_level = weights.unflatten(-1, (self.num_levels, self.num_points))
        return linear(self.proj_output, attend(by_head, sizes, level_start_index, locations, by_level))

    def _locations(self, q: Tensor, p: Tensor, sizes: list[list[int]]) -> Tensor:
        """``[B, Q, H, L, P, 2]``, in float32 at least."""
        check_tensor("p", p)
        levels = self.num_levels
        if p.dim() != 4 or p.shape[:2] != q.shape[:2] or p.shape[2] not in (1, levels) or p.shape[3] not in (2, 4):
            raise ValueError(
                f"p has shape {list(p.shape)}; it must be {[*q.shape[:2], levels, 2]}, or with 4 coordinates for boxes"
            )
        offsets = linear(self.proj_offset, q).unflatten(-1, (self.num_heads, -1, 2))
        extents = torch.tensor([size[::-1] for size in sizes], device=q.device)
        points = [self.num_points] * levels
        locations = point_locations(offsets, p, extents, points)
        return locations.unflatten(3, (levels, self.num_points))
