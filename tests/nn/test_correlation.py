"""Layers on local correlation: the lookup of RAFT and guided attention, against their formulas written out."""

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate

SIZE = (9, 8, 5)


def sampled(field: Tensor, points: Tensor) -> Tensor:
    """``field [B, C, *S]`` at ``points [B, P, N]`` in pixels, by torch's sampler: ``[B, C, P]``."""
    axes, size = points.shape[-1], field.shape[2:]
    grid = ((2 * points + 1) / points.new_tensor(size) - 1).flip(-1)
    if axes == 1:
        field, grid = field.unsqueeze(2), torch.cat([grid, torch.zeros_like(grid)], -1)
    grid = grid.reshape(grid.shape[0], *[1] * (max(axes, 2) - 1), *grid.shape[1:])
    return F.grid_sample(field, grid, align_corners=False).flatten(2)


def all_pairs(query: Tensor, key: Tensor, points: Tensor, levels: int, radius: int) -> Tensor:
    """A volume of all pairs, pooled and looked up, as in the paper."""
    axes, count = query.dim() - 2, query[0, 0].numel()
    volume = torch.einsum("bcq,bck->bqk", query.flatten(2), key.flatten(2)) / sqrt(query.shape[1])
    volume = volume.flatten(0, 1).unsqueeze(1).unflatten(2, key.shape[2:])
    place = points.flatten(2).transpose(1, 2).reshape(-1, 1, axes)
    along = torch.arange(-radius, radius + 1).to(points.dtype)
    shift = torch.cartesian_prod(*[along] * axes).reshape(-1, axes)
    windows = []
    for level in range(levels):
        windows.append(sampled(volume, place / 2**level + shift).squeeze(1))
        if level + 1 < levels:
            volume = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes](volume, 2)
    rows = torch.cat(windows, 1).unflatten(0, (-1, count))
    return rows.transpose(1, 2).unflatten(2, query.shape[2:])


def lookup_case(axes: int) -> list[Tensor]:
    size = SIZE[:axes]
    query, key = torch.randn(2, 6, *[n - 1 for n in size]).double(), torch.randn(2, 6, *size).double()
    points = torch.rand(2, axes, *query.shape[2:], dtype=torch.float64) * (max(size) + 4) - 2
    # In steps of a quarter plus an eighth no level has a point on a grid line.
    return [query, key, (points * 4).floor() / 4 + 0.125]


def test_lookup_is_that_of_a_volume_of_all_pairs(axes: int) -> None:
    layer = dk.nn.CorrelationLookup(levels=3, radius=2, spatial_dims=axes)
    values = lookup_case(axes)
    actual = evaluate(layer, values, [0, 1, 2], torch.float64)
    expected = evaluate(lambda *v: all_pairs(*v, levels=3, radius=2), values, [0, 1, 2], torch.float64)
    for name, one, truth in zip(("output", "query", "key", "points"), actual, expected, strict=True):
        assert_close(one, truth, name=name)


def test_lookup_of_rows_is_that_of_each_row() -> None:
    query, key = torch.randn(2, 3, 4, 10).double(), torch.randn(2, 3, 4, 12).double()
    points = torch.rand(2, 1, 4, 10).double() * 12
    layer = dk.nn.CorrelationLookup(levels=2, radius=1, spatial_dims=1)
    result = layer(query, key, points)
    assert result.shape == (2, 6, 4, 10)
    for row in range(4):
        assert_close(result[:, :, row], layer(query[:, :, row], key[:, :, row], points[:, :, row]))


@pytest.mark.filterwarnings("error")
def test_small_levels_far_from_their_points_raise_no_suspicion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dk.ops._suspect.looks_left, "locations", 9)
    layer = dk.nn.CorrelationLookup(levels=4, radius=4)
    layer(torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8), torch.full((1, 2, 8, 8), 1e4))


def test_lookup_arguments_that_are_wrong() -> None:
    layer = dk.nn.CorrelationLookup(levels=3)
    map, points = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((map, torch.zeros(1, 2, 3, 8), points), ValueError, "key has spatial size 3x8; with 3 levels .* at least 4"),
        ((map, torch.zeros(1, 3, 8, 8), points), ValueError, "it must have 1 images or rows of 3 channels"),
        (
            (map, map, torch.zeros(1, 2, 8, 7)),
            ValueError,
            r"points has shape \[1, 2, 8, 7\].* it must be \[1, 2, 8, 8\]",
        ),
        ((map, map, points.half()), TypeError, "points has dtype torch.float16"),
        ((map[0], map, points), ValueError, "query has shape .*; it must have 4 axes"),
    ]
    for args, error, message in wrong:
        with pytest.raises(error, match=message):
            layer(*args)
    with pytest.raises(ValueError, match="radius is -1"):
        dk.nn.CorrelationLookup(radius=-1)


def attention_written_out(layer: dk.nn.GuidedDeformAttn, input: Tensor, source: Tensor, flow: Tensor) -> Tensor:
    """All samples of keys and values, then a softmax over frames and points."""
    points = layer.sampling_points(input, source, flow)
    batch, count, heads, frames, taps, _ = points.shape
    query = layer.query_proj(input.flatten(2).transpose(1, 2)).unflatten(-1, (heads, -1))
    scores, values = [], []
    for t in range(frames):
        tokens = source[:, t].movedim(1, -1)
        for projection, found in ((layer.key_proj, scores), (layer.value_proj, values)):
            field = projection(tokens).movedim(-1, 1).unflatten(1, (heads, -1)).flatten(0, 1)
            place = points[:, :, :, t].transpose(1, 2).flatten(0, 1).flatten(1, 2)
            samples = sampled(field, place).reshape(batch, heads, -1, count, taps)
            found.append(samples)
    keys, values_of_all = torch.cat(scores, -1), torch.cat(values, -1)
    logits = torch.einsum("bqhd,bhdqk->bhqk", query, keys) / sqrt(query.shape[-1])
    mixed = torch.einsum("bhqk,bhdqk->bqhd", logits.softmax(-1), values_of_all)
    return layer.output_proj(mixed.flatten(2)).transpose(1, 2).unflatten(2, input.shape[2:])


def test_guided_attention_is_its_formula(axes: int) -> None:
    size = SIZE[:axes]
    layer = dk.nn.GuidedDeformAttn(6, heads=2, max_offset=2.0, spatial_dims=axes).double()
    torch.nn.init.normal_(layer.offset_head[2].weight, std=0.3)
    values = [
        torch.randn(2, 6, *size).double(),
        torch.randn(2, 2, 6, *size).double(),
        torch.randn(2, 2, axes, *size).double(),
    ]
    actual = evaluate(layer, values, [0, 1, 2], torch.float64)
    expected = evaluate(lambda *v: attention_written_out(layer, *v), values, [0, 1, 2], torch.float64)
    for name, one, truth in zip(("output", "input", "source", "flow"), actual, expected, strict=True):
        assert_close(one, truth, name=name)
    loss = (layer(*values) ** 2).sum()
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, list(layer.parameters())[:-4]))


def test_guided_attention_starts_at_the_window_around_the_flow() -> None:
    layer = dk.nn.GuidedDeformAttn(4, heads=2).double()
    flow = torch.randn(1, 1, 2, 5, 6).double()
    points = layer.sampling_points(torch.randn(1, 4, 5, 6).double(), torch.randn(1, 1, 4, 5, 6).double(), flow)
    assert points.shape == (1, 30, 2, 1, 9, 2)
    assert_close(
        points[0, 8, 1, 0],
        torch.cartesian_prod(*[torch.arange(-1.0, 2)] * 2) + torch.tensor([1.0, 2.0]) + flow[0, 0, :, 1, 2],
    )
    assert_equal(points[:, :, 0], points[:, :, 1])


def test_guided_attention_arguments_that_are_wrong() -> None:
    layer = dk.nn.GuidedDeformAttn(4, heads=2)
    input, source, flow = torch.zeros(1, 4, 5, 6), torch.zeros(1, 3, 4, 5, 6), torch.zeros(1, 3, 2, 5, 6)
    for args, message in (
        ((torch.zeros(1, 3, 5, 6), source, flow), "input has 3 channels; this layer has dim=4"),
        ((input, source[:, 0], flow), r"source has shape \[1, 4, 5, 6\]; .*it must be \[1, 4, 4, 5, 6\]"),
        ((input, source, flow[:, :2]), r"flow has shape \[1, 2, 2, 5, 6\]; .* it must be \[1, 3, 2, 5, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*args)
    for options, message in (({"heads": 3}, "dim is 4"), ({"max_offset": 0}, "max_offset is 0")):
        with pytest.raises(ValueError, match=message):
            dk.nn.GuidedDeformAttn(4, **{"heads": 2, **options})
