"""The layer of multi-scale deformable attention, which predicts sampling locations and weights from the queries."""

from collections.abc import Sequence
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._levels import SpatialShapes, level_sizes
from ..ops._shape import check_count, check_tensor, compute_dtype
from ..ops.ms_deform_attn.op import ms_deform_attn
from ._linear import linear
from ._public import named_elsewhere


def point_locations(offsets: Tensor, references: Tensor, extents: Tensor, points: Sequence[int]) -> Tensor:
    """The sampling locations: reference points plus ``offsets / extent``, or plus offsets in units of half a box.

    Args:
        offsets: ``[B, Q, H, P, N]``, the offsets of the points of all levels, one level after the other.
        references: ``[B, Q, L, N]``, or ``[B, Q, L, 2N]`` for boxes, centre before size; L may be 1 for all levels.
        extents: ``[L, N]``, the size of each level, x first.
        points: the number of points of each level.

    Returns:
        ``[B, Q, H, P, N]`` in float32, or in float64 if the offsets are float64.
    """
    axes = offsets.shape[-1]
    offsets = offsets.to(compute_dtype(offsets.dtype))
    references = references.to(offsets.dtype).expand(-1, -1, len(points), -1)
    # Points and coordinates are one axis: torch is several times slower with an innermost axis of N elements.
    flat = offsets.flatten(-2)
    centres = _of_points(references[..., :axes], points, 2).flatten(-2).unsqueeze(2)
    if references.shape[-1] == axes:
        locations = torch.addcdiv(centres, flat, _of_points(extents.to(offsets.dtype), points, 0).flatten())
    else:
        # Only levels with points are divided by.
        counts = [count for count in points for _ in range(count)]
        units = _of_points(references[..., axes:] / 2, points, 2)
        # A single number needs no copy to the device.
        units = units / (points[0] if len(set(points)) == 1 else units.new_tensor(counts).unsqueeze(-1))
        locations = torch.addcmul(centres, flat, units.flatten(-2).unsqueeze(2))
    return locations.unflatten(-1, offsets.shape[-2:])


def value_and_weights(layer: Any, query: Tensor, source: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values and the attention weights of a layer with the parameters of Deformable DETR's.

    Returns:
        The projected ``source``, ``[B, S, H, D]``, with zeros where ``padding [B, S]`` is True; and the weights of the
        points, ``[B, Q, H, P]``.
    """
    weights = linear(layer.attention_weights, query).unflatten(-1, (layer.n_heads, -1)).softmax(-1)
    value = linear(layer.value_proj, source)
    if padding is not None:
        value = value.masked_fill(padding.unsqueeze(-1), 0.0)
    return value.unflatten(-1, (layer.n_heads, -1)), weights


def _of_points(levels: Tensor, points: Sequence[int], dim: int) -> Tensor:
    """Repeat each entry along ``dim``, one for each level, as often as the level has points."""
    parts = zip(levels.split(1, dim), points, strict=True)
    return torch.cat([level.expand(*level.shape[:dim], count, *level.shape[dim + 1 :]) for level, count in parts], dim)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: every query predicts and samples a few points on every level of a pyramid.

    ``output[b, q] = output_proj(concatenation over h of sum over l, p of
    weight[b, q, h, l, p] * sample(value_l[b, h], location[b, q, h, l, p]))``

    with ``value = value_proj(input_flatten)``, ``weight = softmax over l, p of attention_weights(query)`` and, for
    reference points, ``location = reference_points[b, q, l] + sampling_offsets(query) / size_l``; for reference boxes
    ``location = centre + sampling_offsets(query) / n_points * box_size / 2``. See :func:`deformkit.ms_deform_attn`.

    In a new layer each head samples in its own direction from the reference point, its point i at a distance of i + 1
    pixels, and all weights are equal. In two dimensions the directions are spread over a circle, in three over a
    sphere; in one dimension they alternate. The parameters have the names and the order of Deformable DETR's.

    Args:
        d_model: number of channels of queries, inputs and outputs.
        n_levels: L, the number of levels of the pyramid.
        n_heads: H, the number of heads, which must divide ``d_model``.
        n_points: P, the number of points of one head on one level; or a list with one number for each level.
        spatial_dims: N, the number of axes of a level: 1, 2 or 3.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shapes of ``forward(query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index=None,
    input_padding_mask=None)``, all coordinates **x first**, normalised to 0 .. 1 over the levels:

        * ``query [B, Q, d_model]``;
        * ``reference_points [B, Q, L, N]``, or boxes ``[B, Q, L, 2N]``, centre before size; L may be 1 for all levels.
          They should be float32 (float64 in a float64 layer) even if the layer is in half precision, in which a
          location may be off by more than a pixel;
        * ``input_flatten [B, S, d_model]``: the levels, each flattened in row-major order, one after the other;
        * ``input_spatial_shapes``: the size of each level in tensor-axis order, ``[(h, w), ...]``; the values of a
          tensor ``[L, N]`` are read, so the call waits for its device and cannot be compiled;
        * ``input_level_start_index``: not used, since the shapes determine where a level starts; it keeps the position
          of the arguments of Deformable DETR;
        * ``input_padding_mask [B, S]``: bool, True for padding, whose values are replaced by 0;
        * output ``[B, Q, d_model]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> layer = MSDeformAttn(64, n_levels=2, n_heads=4)
        >>> pyramid = torch.randn(2, 32 * 48 + 16 * 24, 64)
        >>> layer(torch.randn(2, 100, 64), torch.rand(2, 100, 2, 2), pyramid, [(32, 48), (16, 24)]).shape
        torch.Size([2, 100, 64])

    Paper: Deformable DETR, https://arxiv.org/abs/2010.04159.
    """

    @named_elsewhere(embed_dims="d_model", num_levels="n_levels", num_heads="n_heads", num_points="n_points")
    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int | Sequence[int] = 4,
        *,
        spatial_dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, count in (("d_model", d_model), ("n_levels", n_levels), ("n_heads", n_heads)):
            check_count(name, count)
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it must be 1, 2 or 3")
        if d_model % n_heads:
            raise ValueError(f"d_model is {d_model}; it must be divisible by n_heads, which is {n_heads}")
        super().__init__()
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self._level_points = _level_points(n_points, n_levels)
        self.n_points = n_points if isinstance(n_points, int) else self._level_points
        self.spatial_dims = spatial_dims
        points = n_heads * sum(self._level_points)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sampling_offsets = nn.Linear(d_model, points * spatial_dims, **made)
        self.attention_weights = nn.Linear(d_model, points, **made)
        self.value_proj = nn.Linear(d_model, d_model, **made)
        self.output_proj = nn.Linear(d_model, d_model, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections at random and the points around the reference point, with equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        steps = torch.cat([torch.arange(1.0, points + 1) for points in self._level_points])
        bias = _directions(self.n_heads, self.spatial_dims)[:, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Any = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the output for every query; see the class for shapes."""
        self._check_features("query", query)
        self._check_features("input_flatten", input_flatten)
        if input_flatten.shape[0] != query.shape[0]:
            raise ValueError(f"input_flatten has batch size {input_flatten.shape[0]}; query has {query.shape[0]}")
        sizes = self._sizes(input_spatial_shapes)
        locations = self._locations(query, reference_points, sizes)
        if input_padding_mask is not None:
            check_tensor("input_padding_mask", input_padding_mask)
            if input_padding_mask.dtype != torch.bool:
                raise TypeError(f"input_padding_mask has dtype {input_padding_mask.dtype}; it must be torch.bool")
            if input_padding_mask.shape != input_flatten.shape[:2]:
                raise ValueError(
                    f"input_padding_mask has shape {list(input_padding_mask.shape)}; "
                    f"it must be {list(input_flatten.shape[:2])}, as input_flatten without its last axis"
                )

        value, weights = value_and_weights(self, query, input_flatten, input_padding_mask)
        output = ms_deform_attn(value, sizes, locations, weights, num_points=self._level_points)
        return linear(self.output_proj, output)

    def sampling_locations(
        self, query: Tensor, reference_points: Tensor, input_spatial_shapes: SpatialShapes
    ) -> Tensor:
        """The locations at which the layer samples its input; the arguments are those of ``forward``.

        Returns:
            ``[B, Q, H, L, P, N]``, or ``[B, Q, H, P, N]`` with the points of all levels one after the other if
            ``n_points`` is a list. Coordinates are x first, normalised to 0 .. 1 over each level, float32 or float64.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape does not fit; the message names the argument.

        Example:
            >>> layer = MSDeformAttn(64, n_levels=2, n_heads=4)
            >>> shapes = [(32, 48), (16, 24)]
            >>> layer.sampling_locations(torch.randn(2, 100, 64), torch.rand(2, 100, 2, 2), shapes).shape
            torch.Size([2, 100, 4, 2, 4, 2])
        """
        locations = self._locations(query, reference_points, self._sizes(input_spatial_shapes))
        return locations.unflatten(3, (self.n_levels, self.n_points)) if isinstance(self.n_points, int) else locations

    def extra_repr(self) -> str:
        """The arguments."""
        text = f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}"
        return text if self.spatial_dims == 2 else f"{text}, spatial_dims={self.spatial_dims}"

    def _locations(self, query: Tensor, reference_points: Tensor, sizes: list[list[int]]) -> Tensor:
        """``[B, Q, H, P, N]``, computed in float32 at least, independent of the dtypes of the layer and of autocast."""
        axes, heads = self.spatial_dims, self.n_heads
        self._check_features("query", query)
        check_tensor("reference_points", reference_points)
        if not reference_points.is_floating_point():
            raise TypeError(f"reference_points has dtype {reference_points.dtype}; it must be a floating dtype")
        batch, queries, _ = query.shape
        if (
            reference_points.dim() != 4
            or reference_points.shape[:2] != query.shape[:2]
            or reference_points.shape[2] not in (1, self.n_levels)
            or reference_points.shape[3] not in (axes, 2 * axes)
        ):
            raise ValueError(
                f"reference_points has shape {list(reference_points.shape)}; it must be "
                f"{[batch, queries, self.n_levels, axes]}, or with {2 * axes} coordinates for boxes"
            )
        offsets = linear(self.sampling_offsets, query).unflatten(-1, (heads, -1, axes))
        extents = torch.tensor([size[::-1] for size in sizes], device=offsets.device)
        return point_locations(offsets, reference_points, extents, self._level_points)

    def _sizes(self, input_spatial_shapes: SpatialShapes) -> list[list[int]]:
        beside = f"this layer has spatial_dims={self.spatial_dims}"
        sizes = level_sizes("input_spatial_shapes", input_spatial_shapes, self.spatial_dims, beside)
        if len(sizes) != self.n_levels:
            raise ValueError(f"input_spatial_shapes has {len(sizes)} levels; this layer has n_levels={self.n_levels}")
        return sizes

    def _check_features(self, name: str, value: Tensor) -> None:
        check_tensor(name, value)
        if value.dim() != 3 or value.shape[-1] != self.d_model:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must have 3 axes, the last of {self.d_model}")


def _directions(heads: int, axes: int) -> Tensor:
    """``[H, N]``, a direction for each head, x first, scaled so that its largest component is 1 or -1."""
    head = torch.arange(heads, dtype=torch.float64)
    if axes == 1:
        directions = (1 - 2 * (head % 2)).unsqueeze(-1)
    elif axes == 2:
        angle = head * (2 * pi / heads)
        directions = torch.stack([angle.cos(), angle.sin()], -1)
    else:
        # A spiral from pole to pole that turns by the golden angle keeps all points apart.
        height, angle = 1 - (2 * head + 1) / heads, head * (pi * (3 - sqrt(5)))
        radius = (1 - height**2).sqrt()
        directions = torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)
    return directions / directions.abs().amax(-1, keepdim=True)


def _level_points(n_points: int | Sequence[int], levels: int) -> list[int]:
    """The number of points on each level."""
    if isinstance(n_points, int):
        check_count("n_points", n_points)
        return [n_points] * levels
    try:
        points = list(n_points)
    except TypeError:
        raise TypeError(f"n_points is {n_points!r}; it must be an int or a sequence of ints") from None
    for count in points:
        check_count("n_points", count, 0)
    if len(points) != levels or sum(points) < 1:
        raise ValueError(f"n_points is {points}; it needs {levels} numbers, one for each level, that are not all 0")
    return points
