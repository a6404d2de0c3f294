"""Attention with divided value and queries: which levels are sent to the queries, and which receive them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from ..ops._levels import SpatialShapes, located_levels
from ..ops._operator import operators
from ..ops._shape import Mode, check_choice, code_of
from ._halo import Rows, collect, cuts, exchange
from ._spatial import Division

_WAYS = ("auto", "gather", "shard")


@dataclass(frozen=True)
class Traffic:
    """The bytes that attention moves between ranks in its forward, and the levels for which that is least.

    Attributes:
        gathered: for each level, of sending it to the ranks that have the queries.
        sharded: for each level, of sending the points and weights of all queries to the ranks that have it.
        returned: of the outputs that come back, if any level stays where it is.
        stay: for each level, whether it does.
        total: of the choice.
    """

    gathered: list[int]
    sharded: list[int]
    returned: int
    stay: list[bool]
    total: int


def attention_traffic(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    num_points: int | Sequence[int] | None = None,
    divide: str = "auto",
) -> Traffic:
    """How :func:`spatial_ms_deform_attn` divides a call.

    For every pair of a rank that sends and one that receives, a level of ``S_l`` positions takes
    ``B * S_l * H * D`` values if it is gathered, and ``B * Q * H * P_l`` points of N float32 numbers and as many
    weights if it stays; the outputs that come back are ``B * Q * H * D`` values. Each number is the sum over all ranks,
    which hold equal shares. Levels stay if that is less in all; the backward moves as much again.

    Args:
        value: as in :func:`spatial_ms_deform_attn`, of which only shape, dtype and mesh count.
        spatial_shapes: the sizes of the levels.
        sampling_locations: as ``value``.
        num_points: as in :func:`deformkit.ms_deform_attn`.
        divide: ``"auto"``; or ``"gather"`` or ``"shard"`` for all levels.

    Returns:
        The bytes of each way and the choice.
    """
    check_choice("divide", divide, _WAYS)
    sizes, points = located_levels(spatial_shapes, sampling_locations, num_points)
    others = Division.of("value", value, 1, 1).ranks - 1
    batch, queries, heads = sampling_locations.shape[:3]
    bytes_of_point = sampling_locations.shape[-1] * sampling_locations.element_size() + value.element_size()
    gathered = [others * batch * prod(size) * heads * value.shape[3] * value.element_size() for size in sizes]
    sharded = [others * batch * queries * heads * count * bytes_of_point for count in points]
    returned = others * batch * queries * heads * value.shape[3] * value.element_size()
    stay = [there < here for here, there in zip(gathered, sharded, strict=True)]
    saved = sum(here - there for here, there, stays in zip(gathered, sharded, stay, strict=True) if stays)
    if divide != "auto" or saved <= returned:
        stay = [divide == "shard"] * len(sizes)
    moved = sum(there if stays else here for here, there, stays in zip(gathered, sharded, stay, strict=True))
    return Traffic(gathered, sharded, returned, stay, moved + (returned if any(stay) else 0))


def spatial_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    mode: Mode = "linear",
    divide: str = "auto",
) -> DTensor:
    """Multi-scale deformable attention where every rank has some positions of the value and some queries.

    The value and every gradient are those of :func:`deformkit.ms_deform_attn`. A level is either gathered by all ranks,
    which then sample it for their own queries; or it stays, each rank samples its part for the queries of all, and the
    sums come back. :func:`attention_traffic` says which moves fewer bytes: a decoder has few queries for a large value,
    an encoder has as many queries as positions.

    Args:
        value: ``[B, S, H, D]``, a DTensor with ``Shard(1)`` on one axis of its mesh, and ``Shard(0)`` or
            ``Replicate()`` on the others.
        spatial_shapes: the sizes of the levels, in tensor-axis order.
        sampling_locations: ``[B, Q, H, L, P, N]`` or ``[B, Q, H, P, N]``, divided in the same way.
        attention_weights: ``[B, Q, H, L, P]`` or ``[B, Q, H, P]``, divided in the same way.
        num_points: as in :func:`deformkit.ms_deform_attn`.
        mode: ``"linear"`` or ``"nearest"``. ``"nearest"`` needs ``divide="gather"``.
        divide: ``"auto"``: what moves fewer bytes; ``"gather"`` or ``"shard"``: all levels in this way.

    Returns:
        ``[B, Q, H*D]``, a DTensor divided as ``value`` is.

    Raises:
        TypeError: ``value`` is not a DTensor.
        ValueError: ``value`` is not cut along its positions.
    """
    if mode == "nearest":
        # A location that is clamped into a level is not clamped into a part of it.
        divide = "gather" if divide == "auto" else divide
        if divide != "gather":
            raise ValueError(f'mode is "nearest" and divide is {divide!r}; it must be "gather"')
    sizes, counts = located_levels(spatial_shapes, sampling_locations, num_points)
    call = _Call.of(value, sizes, counts, sampling_locations, attention_weights, code_of("mode", mode))
    stay = attention_traffic(value, spatial_shapes, sampling_locations, num_points, divide).stay
    outputs = []
    for function, staying in ((call.gathered, False), (call.sharded, True)):
        levels = [level for level, stays in enumerate(stay) if stays == staying]
        if levels:
            outputs.append(function(levels))
    return call.division.together(outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1], call.queries)


class _Level(NamedTuple):
    size: list[int]
    positions: Rows
    points: Rows


class _Call(NamedTuple):
    """A call of attention as one rank sees it."""

    division: Division
    value: Tensor
    locations: Tensor
    weights: Tensor
    mode: int
    levels: list[_Level]
    queries: int

    @classmethod
    def of(
        cls,
        value: Tensor,
        sizes: Sequence[list[int]],
        counts: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        mode: int,
    ) -> "_Call":
        division = Division.of("value", value, 1, 1)
        locations, weights = division.part(sampling_locations), division.part(attention_weights)
        if locations.dim() == 6:
            locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
        positions = pairwise(accumulate((prod(size) for size in sizes), initial=0))
        points = pairwise(accumulate(counts, initial=0))
        levels = [_Level(*level) for level in zip(sizes, positions, points, strict=True)]
        queries = sampling_locations.shape[1]
        return cls(division, division.part(value), locations, weights, mode, levels, queries)

    def gathered(self, levels: Sequence[int]) -> Tensor:
        """This rank's queries over levels that every rank receives."""
        chosen = [self.levels[level] for level in levels]
        total, ranks = self.levels[-1].positions[1], self.division.ranks
        fields = [self.division.rows(self.value, total, [level.positions] * ranks) for level in chosen]
        return _attend(fields, [level.size for level in chosen], *self._at(levels), self._counts(levels), self.mode)

    def sharded(self, levels: Sequence[int]) -> Tensor:
        """This rank's queries over levels of which every rank samples its part for the queries of all."""
        division, of_all = self.division, [(0, self.queries)] * self.division.ranks
        locations, weights = (
            exchange(tensor, 1, self.queries, of_all, division.mesh, division.mesh_axis) for tensor in self._at(levels)
        )
        fields, sizes, counts, places, factors = [], [], [], [], []
        parts = locations.split(self._counts(levels), 3), weights.split(self._counts(levels), 3)
        for level, some_locations, some_weights in zip(levels, *parts, strict=True):
            rows = self._rows(self.levels[level])
            if rows is None or not some_weights.numel():
                continue
            field, first, count = rows
            height = self.levels[level].size[0]
            scale, shift = (torch.zeros(locations.shape[-1], dtype=locations.dtype) for _ in range(2))
            # Rows are the last coordinate.
            scale[:-1], scale[-1], shift[-1] = 1, height / count, first / count
            fields.append(field)
            sizes.append([count, *self.levels[level].size[1:]])
            counts.append(some_weights.shape[3])
            places.append(some_locations * scale.to(locations.device) - shift.to(locations.device))
            factors.append(some_weights)
        if fields:
            output = _attend(fields, sizes, torch.cat(places, 3), torch.cat(factors, 3), counts, self.mode)
        else:
            # Nothing, of which all tensors are a part: the others wait for their gradients.
            output = self.value.new_zeros(len(self.value), self.queries, self.value.shape[2] * self.value.shape[3])
            output = output + sum(t.flatten()[:0].sum().to(output.dtype) for t in (locations, weights, self.value))
        return collect(output, 1, self.queries, division.mesh, division.mesh_axis)

    def _counts(self, levels: Sequence[int]) -> list[int]:
        return [last - first for first, last in (self.levels[level].points for level in levels)]

    def _at(self, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The locations and weights of the points on some levels."""
        chosen = [i for level in levels for i in range(*self.levels[level].points)]
        return self.locations[:, :, :, chosen], self.weights[..., chosen]

    def _rows(self, level: _Level) -> tuple[Tensor, int, int] | None:
        """The rows of a level in which this rank has positions, with zeros where it has none.

        Returns:
            The rows, the first of them and their number; None if there are none.
        """
        mine = cuts(self.levels[-1].positions[1], self.division.ranks)[self.division.me]
        first, last = max(mine[0], level.positions[0]), min(mine[1], level.positions[1])
        if first >= last:
            return None
        width = prod(level.size[1:])
        before = (first - level.positions[0]) % width
        after = -(last - level.positions[0]) % width
        row, count = (first - level.positions[0]) // width, (last - first + before + after) // width
        return pad(self.value[:, first - mine[0] : last - mine[0]], [0, 0, 0, 0, before, after]), row, count


def _attend(
    fields: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    locations: Tensor,
    weights: Tensor,
    counts: list[int],
    mode: int,
) -> Tensor:
    """The operator itself: the public function would warn of locations on other parts of a level."""
    flat = [length for size in sizes for length in size]
    output: Tensor = operators["ms_deform_attn"](torch.cat(list(fields), 1), flat, locations, weights, counts, mode)
    return output
