"""The lookup of RAFT: local correlation in windows of a pyramid, without a volume of all pairs."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._shape import check_alike, check_count, check_floating, check_location_dtype, times
from ..ops.deform_correlate.op import deform_correlate
from ._field import check_field, positions

_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Pyramid = tuple[Tensor, list[tuple[int, ...]]]


def window_locations(places: Tensor, sizes: Sequence[Sequence[int]], radius: int) -> Tensor:
    """The normalised windows ``[B, Q, *, L, P, N]`` around ``places [B, Q, *, N]``, x first.

    Args:
        places: in pixels of the first level, in tensor-axis order; * is an axis of heads, or of windows of a query.
        sizes: of the levels, each half as large as the one before.
        radius: of the windows, in pixels of each level; their points are in row-major order.
    """
    axes = places.shape[-1]
    window = [2 * radius + 1] * axes
    shift = (positions(window, places.dtype, places.device) - radius).flatten(0, -2)
    levels = []
    for level, size in enumerate(sizes):
        pixel = places.unsqueeze(-2) / 2**level + shift
        levels.append((pixel + 0.5) / pixel.new_tensor(size))
    # What is farther away is outside all the same, in a single level of one pixel too.
    return torch.stack(levels, -3).clamp(-1, 2).flip(-1)


class CorrelationLookup(nn.Module):
    """Local correlation of optical flow and stereo: a window around a point, on each level of a pyramid.

    ``output[b, (l, d), q] = sum over c of query[b, c, q] * sample(level_l[b, c], points[b, :, q] / 2^l + d) / sqrt(C)``

    where ``level_0`` is ``key``, each further level is the mean of 2^N pixels of the one before, and ``d`` runs over
    the whole numbers from -radius to radius on every axis. Outside a level ``sample`` is 0. The products are computed
    at the points alone: memory grows with the output, and no volume of all pairs of pixels is kept.

    Args:
        levels: number of levels L.
        radius: radius of the window r, in pixels of a level; it has ``(2r + 1)^N`` points.
        spatial_dims: N. With 1, maps ``[B, C, H, W]`` are also accepted and looked up row by row, as in stereo.

    Shapes of ``forward(query, key, points)``:
        ``query [B, C, *S]`` and ``key [B, C, *T]``, the features of both images in the same dtype; ``points
        [B, N, *S]`` in pixels of ``key``, in tensor-axis order (h, w), absolute: the position of a pixel plus its flow.
        float64 if ``query`` is float64, else float32. Output ``[B, L*(2r+1)^N, *S]`` in the dtype of ``query``: level
        by level, each window in row-major order. The code of RAFT lists windows column by column; see the example.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or size does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> lookup = CorrelationLookup(levels=2, radius=3)
        >>> first, second = torch.randn(1, 64, 24, 32), torch.randn(1, 64, 24, 32)
        >>> pyramid = lookup.pyramid(second)  # once for all iterations
        >>> points = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")).unsqueeze(0)
        >>> windows = lookup.look_up(first, pyramid, points)
        >>> windows.shape
        torch.Size([1, 98, 24, 32])
        >>> as_raft = windows.unflatten(1, (2, 7, 7)).transpose(2, 3).flatten(1, 3)

    Papers: RAFT, https://arxiv.org/abs/2003.12039; RAFT-Stereo, https://arxiv.org/abs/2109.07547.
    """

    def __init__(self, levels: int = 4, radius: int = 4, *, spatial_dims: int = 2) -> None:
        super().__init__()
        check_count("levels", levels)
        check_count("radius", radius, 0)
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it must be 1, 2 or 3")
        self.levels, self.radius, self.spatial_dims = levels, radius, spatial_dims

    def forward(self, query: Tensor, key: Tensor, points: Tensor) -> Tensor:
        """Correlate every pixel of ``query`` with the windows of ``key`` around its point."""
        return self.look_up(query, self.pyramid(key), points)

    def pyramid(self, key: Tensor) -> Pyramid:
        """The levels of ``key``, side by side as ``[B, S, 1, C]``, and their sizes, for :meth:`look_up`."""
        axes = self.spatial_dims
        check_field("key", key, [axes, 2] if axes == 1 else [axes])
        level, smallest = self._rows(key), 2 ** (self.levels - 1)
        if min(level.shape[2:]) < smallest:
            raise ValueError(
                f"key has spatial size {times(key.shape[2:])}; with {self.levels} levels every axis that is pooled "
                f"needs at least {smallest} elements"
            )
        maps = [level]
        for _ in range(self.levels - 1):
            maps.append(_POOLS[axes](maps[-1], 2))
        flat = torch.cat([one.flatten(2) for one in maps], 2).transpose(1, 2).unsqueeze(2)
        return flat.contiguous(), [tuple(one.shape[2:]) for one in maps]

    def look_up(self, query: Tensor, pyramid: Pyramid, points: Tensor) -> Tensor:
        """:meth:`forward` for the result of :meth:`pyramid`, which serves any number of lookups."""
        axes, (key, sizes) = self.spatial_dims, pyramid
        check_field("query", query, [axes, 2] if axes == 1 else [axes])
        self._check_points(query, points)
        queries, places = self._rows(query), self._rows(points).movedim(1, -1).flatten(1, -2)
        size = queries.shape[2:]
        if key.shape[0] != queries.shape[0] or key.shape[3] != queries.shape[1]:
            raise ValueError(
                f"query has shape {list(query.shape)}; with the key it must have {key.shape[0]} images or rows of "
                f"{key.shape[3]} channels"
            )
        vectors = queries.flatten(2).transpose(1, 2).unsqueeze(2) / sqrt(queries.shape[1])
        products = deform_correlate(vectors, key, sizes, window_locations(places.unsqueeze(2), sizes, self.radius))
        output = products.flatten(2).transpose(1, 2).unflatten(2, size)
        if query.dim() > axes + 2:
            output = output.unflatten(0, (query.shape[0], -1)).movedim(1, 2)
        return output

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"levels={self.levels}, radius={self.radius}, spatial_dims={self.spatial_dims}"

    def _rows(self, field: Tensor) -> Tensor:
        """``field [B, C, H, W]`` as ``[B*H, C, W]`` where rows are looked up; otherwise ``field``."""
        return field.movedim(2, 1).flatten(0, 1) if field.dim() > self.spatial_dims + 2 else field

    def _check_points(self, query: Tensor, points: Tensor) -> None:
        check_floating("points", points)
        check_alike("points", points, "query", query, dtype=False)
        check_location_dtype("points", points, "a query", query.dtype)
        expected = [query.shape[0], self.spatial_dims, *query.shape[2:]]
        if list(points.shape) != expected:
            raise ValueError(
                f"points has shape {list(points.shape)}; with query of shape {list(query.shape)} it must be {expected}"
            )
