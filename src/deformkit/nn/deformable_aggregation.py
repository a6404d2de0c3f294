"""Multi-view aggregation: key points in space read the feature pyramids of all cameras."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops._levels import SpatialShapes, level_sizes
from ..ops._shape import check_alike, check_count, check_floating, check_location_dtype
from ..ops.ms_deform_attn.op import ms_deform_attn
from ._linear import linear


def aggregate_views(value: Tensor, sizes: SpatialShapes, points: Tensor, weights: Tensor) -> Tensor:
    """Read the maps of all views at key points, with a weight for each view, scale, point and group.

    Args:
        value: ``[B, S, G, D]``, the maps one after the other: all scales of the first camera, then of the second.
        sizes: the size (h, w) of each map.
        points: ``[B, Q, P, V, 2]``, x first, 0 to 1; a point with a coordinate outside is not read.
        weights: ``[B, Q, V, scales, P, G]``.

    Returns:
        ``[B, Q, G*D]``.
    """
    # To [B, Q, G, V*scales, P].
    weights = weights.permute(0, 1, 5, 2, 3, 4).flatten(3, 4).to(value.dtype)
    # A camera may see a key point at infinity, or nowhere: such a point is not read. Neither is one with a coordinate
    # of 2, which lies outside of a map of any size. Negative locations would look like those of grid_sample, of which
    # ms_deform_attn warns.
    inside = points.where((points > 0) & (points < 1), 2.0).transpose(2, 3)
    scales = len(sizes) // points.shape[3]
    locations = inside.unsqueeze(3).expand(-1, -1, -1, scales, -1, -1).flatten(2, 3).unsqueeze(2)
    return ms_deform_attn(value, sizes, locations, weights)


class DeformableAggregation(nn.Module):
    """Deformable aggregation of several views: each query reads its key points in every camera and scale.

    ``output[b, q, g] = sum over p, v, s of
    w[b, q, p, v, s, g] * 1(0 < x < 1) * sample(map_{v,s}[b, g], x * size_{v,s} - 1/2)``, ``x = points[b, q, p, v]``

    followed by a linear layer over all groups, where v are the cameras, s the scales and ``w`` is the softmax over p, v
    and s of a linear layer of the query. The maps are the levels of :func:`deformkit.ms_deform_attn`, so that one call
    reads all of them; neither features nor locations are copied for each group.

    Args:
        dim: C, channels of queries, maps and the output.
        num_cameras: V, number of cameras.
        num_scales: number of scales of each camera.
        num_points: P, number of key points of a query.
        groups: G, number of groups of channels with weights of their own.

    Shapes of ``forward(query, value, spatial_shapes, points)``:
        ``query [B, Q, C]``; ``value [B, S, C]``, the maps one after the other, each flattened in row-major order: all
        scales of the first camera, then of the second; ``spatial_shapes``, V*scales tuples ``(h, w)``; ``points
        [B, Q, P, V, 2]``, where each camera sees each key point, **x first**, 0 to 1 over its image; points with a
        coordinate outside, such as those behind a camera, are not seen and have no gradient. float64 if ``value`` is
        float64, else float32. Output ``[B, Q, C]``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformableAggregation(64, num_cameras=6, num_scales=2, num_points=13)
        >>> shapes = [(16, 44), (8, 22)] * 6
        >>> value = torch.randn(1, 6 * (16 * 44 + 8 * 22), 64)
        >>> layer(torch.randn(1, 50, 64), value, shapes, torch.rand(1, 50, 13, 6, 2)).shape
        torch.Size([1, 50, 64])

    Paper: Sparse4D v2, https://arxiv.org/abs/2305.14018.
    """

    def __init__(
        self, dim: int, num_cameras: int = 6, num_scales: int = 4, num_points: int = 13, groups: int = 8
    ) -> None:
        super().__init__()
        counts = {"dim": dim, "num_cameras": num_cameras, "num_scales": num_scales, "num_points": num_points}
        for name, count in {**counts, "groups": groups}.items():
            check_count(name, count)
        if dim % groups:
            raise ValueError(f"dim is {dim}; it must be divisible by groups, which is {groups}")
        self.dim, self.groups = dim, groups
        self.num_cameras, self.num_scales, self.num_points = num_cameras, num_scales, num_points
        self.weights_fc = nn.Linear(dim, num_points * num_cameras * num_scales * groups)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let all points, cameras and scales have the same weight."""
        for parameter in self.weights_fc.parameters():
            nn.init.zeros_(parameter)

    def forward(self, query: Tensor, value: Tensor, spatial_shapes: SpatialShapes, points: Tensor) -> Tensor:
        """Read ``value`` at ``points`` with weights predicted from ``query``."""
        sizes = self._check(query, value, spatial_shapes, points)
        maps = value.unflatten(-1, (self.groups, -1))
        return linear(self.output_proj, aggregate_views(maps, sizes, points, self.weights(query)))

    def weights(self, query: Tensor) -> Tensor:
        """The weights ``w``, ``[B, Q, V, scales, P, G]``."""
        shape = (self.num_cameras, self.num_scales, self.num_points, self.groups)
        return linear(self.weights_fc, query).unflatten(-1, (-1, self.groups)).softmax(-2).unflatten(-2, shape[:3])

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.dim}, num_cameras={self.num_cameras}, num_scales={self.num_scales}, "
            f"num_points={self.num_points}, groups={self.groups}"
        )

    def _check(
        self, query: Tensor, value: Tensor, spatial_shapes: SpatialShapes, points: Tensor
    ) -> Sequence[Sequence[int]]:
        for name, tensor in (("query", query), ("value", value)):
            check_floating(name, tensor)
            if tensor.dim() != 3 or tensor.shape[2] != self.dim:
                length = "Q" if name == "query" else "S"
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [B, {length}, {self.dim}]")
        check_alike("query", query, "value", value)
        check_alike("points", points, "value", value, dtype=False)
        check_location_dtype("points", points, "a value", value.dtype)
        sizes = level_sizes("spatial_shapes", spatial_shapes, 2, "points have 2 coordinates")
        if len(sizes) != self.num_cameras * self.num_scales:
            raise ValueError(
                f"spatial_shapes has {len(sizes)} levels; this layer needs {self.num_cameras * self.num_scales} = "
                f"{self.num_cameras} cameras x {self.num_scales} scales"
            )
        expected = [value.shape[0], query.shape[1], self.num_points, self.num_cameras, 2]
        if list(points.shape) != expected or query.shape[0] != value.shape[0]:
            raise ValueError(
                f"points has shape {list(points.shape)} and query {list(query.shape)}; with value of shape "
                f"{list(value.shape)} points must be {expected}"
            )
        return sizes
