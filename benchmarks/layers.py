"""Layers, and functions made of several operators, beside the same in operations of torch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deformkit import deform_correlate, ms_deform_attn
from deformkit import nn as dknn
from deformkit._testing import half_of_digits
from deformkit._testing.timing import with_gradients, without_gradients
from deformkit.bench import OURS, PASSES, timed
from deformkit.nn.deformable_aggregation import aggregate_views

TORCH = "torch"


@dataclass(frozen=True)
class Case:
    """A layer, its inputs, and the two functions ``(layer, *inputs)`` that are compared."""

    inputs: list[Tensor]
    theirs: Callable[..., Tensor]
    layer: nn.Module
    ours: Callable[..., Tensor] = lambda layer, *inputs: layer(*inputs)

    def calls(self, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
        """The two calls in ``dtype``, and what to differentiate by: the inputs and the parameters."""
        layer = copy.deepcopy(self.layer).to(dtype)
        inputs = [value.to(dtype, copy=True).requires_grad_() for value in self.inputs]
        found = {OURS: lambda: self.ours(layer, *inputs), TORCH: lambda: self.theirs(layer, *inputs)}
        return found, [*inputs, *layer.parameters()]


def rows(chosen: str, seconds: float, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """The two passes of each case with ``chosen`` in its name."""
    for name, make in CASES.items():
        if chosen not in f"layers {name}":
            continue
        torch.manual_seed(0)
        case = make(tiny)
        worst = _apart(case)
        notes: dict[str, dict[str, Any]] = {OURS: {"error": worst}, TORCH: {}}
        calls, leaves = case.calls(torch.float32)
        if not worst <= half_of_digits(torch.float64):
            notes[OURS]["skipped"] = f"wrong: error {worst:.2g}"
            del calls[OURS]
        sizes = f"{name} {'x'.join(map(str, case.inputs[0].shape))}"
        for what in PASSES:
            runs = {
                key: without_gradients(call) if what == PASSES[0] else with_gradients(call, leaves)
                for key, call in calls.items()
            }
            rivals = timed(runs, notes, seconds)
            yield {"operator": "layers", "case": name, "sizes": sizes, "pass": what, "rivals": rivals}


def _apart(case: Case) -> float:
    """The largest relative difference of the outputs and of each gradient.

    In float64: in float32 a few of many points change their cell by rounding, and with it their slope.
    """
    calls, leaves = case.calls(torch.float64)
    results = []
    for call in calls.values():
        output = call()
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(*results, strict=True))


def sampled(field: Tensor, points: Tensor, padding_mode: str = "border") -> Tensor:
    """``field [B, C, *S]`` at ``points [B, *out, N]`` in pixels: ``[B, C, *out]``."""
    size = points.new_tensor(list(field.shape[2:]))
    grid = ((2 * points + 1) / size - 1).flip(-1)
    rows = grid.flatten(1, -2).reshape(len(grid), *[1] * (field.dim() - 3), -1, grid.shape[-1])
    samples = F.grid_sample(field, rows, padding_mode=padding_mode, align_corners=False)
    return samples.flatten(2).unflatten(2, points.shape[1:-1])


def pixels(like: Tensor) -> Tensor:
    """The positions of the pixels of ``like [B, C, *S]``, ``[*S, N]``."""
    along = [torch.arange(length, dtype=like.dtype) for length in like.shape[2:]]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), -1)


def warp(tiny: bool) -> Case:
    size = (6, 7, 8) if tiny else (96, 112, 96)

    def theirs(layer: nn.Module, input: Tensor, displacement: Tensor) -> Tensor:
        return sampled(input, pixels(input) + displacement.movedim(1, -1))

    return Case([torch.randn(1, 1, *size), 2 * torch.randn(1, 3, *size)], theirs, dknn.Warp3d(boundary="border"))


def splat(tiny: bool) -> Case:
    channels, size = (3, (6, 8)) if tiny else (32, (180, 320))

    def theirs(layer: nn.Module, input: Tensor, flow: Tensor, metric: Tensor) -> Tensor:
        height, width = input.shape[2:]
        weight = (metric - metric.detach().amax((1, 2, 3), keepdim=True)).exp()
        values = torch.cat([input * weight, weight], 1).flatten(2).squeeze(0).t()
        points = (pixels(input) + flow.movedim(1, -1)).flatten(0, -2)
        total = torch.zeros_like(values)
        for corner in product((0, 1), repeat=2):
            pixel = points.detach().floor() + points.new_tensor(corner)
            inside = ((pixel >= 0) & (pixel < pixel.new_tensor([height, width]))).all(-1)
            part = (1 - (points - pixel).abs()).prod(-1) * inside
            index = pixel[:, 0].clamp(0, height - 1) * width + pixel[:, 1].clamp(0, width - 1)
            total = total.index_add(0, index.long(), values * part.unsqueeze(1))
        sums, weights = total.split([input.shape[1], 1], 1)
        return (sums / weights.masked_fill(weights == 0, 1.0)).t().reshape(input.shape)

    inputs = [torch.randn(1, channels, *size), 3 * torch.randn(1, 2, *size), torch.randn(1, 1, *size)]
    return Case(inputs, theirs, dknn.SoftmaxSplat())


def snake(tiny: bool) -> Case:
    channels, size = (2, (6, 7)) if tiny else (64, (96, 96))
    layer = _moving(dknn.SnakeConv2d(channels, channels, 9, axis=1))

    def theirs(layer: Any, input: Tensor) -> Tensor:
        taps, middle = layer.kernel_size, layer.kernel_size // 2
        step = layer.max_step * layer.offset_head(input).tanh()
        before, after = step[:, :middle].flip(1).cumsum(1).flip(1), step[:, middle + 1 :].cumsum(1)
        across = torch.cat([before, torch.zeros_like(step[:, :1]), after], 1)
        along = (torch.arange(taps) - middle).to(input).reshape(-1, 1, 1).expand_as(across)
        points = pixels(input) + torch.stack([across, along], -1)
        # The taps of a position side by side, for a convolution with a stride of as many.
        samples = sampled(input, points.permute(0, 2, 3, 1, 4)).flatten(3)
        return F.conv2d(samples, layer.conv.weight, layer.conv.bias, stride=(1, taps))

    return Case([torch.randn(1, channels, *size)], theirs, layer)


def linear_taps(tiny: bool) -> Case:
    channels, size, taps = (2, (6, 7), 5) if tiny else (64, (96, 96), 7)
    layer = _moving(dknn.LDConv2d(channels, channels, taps))

    def theirs(layer: Any, input: Tensor) -> Tensor:
        taps = layer.num_taps
        column = torch.stack([torch.arange(taps) - (taps - 1) // 2, torch.zeros(taps)], -1).to(input)
        offset = layer.offset_head(input).unflatten(1, (taps, 2)).permute(0, 3, 4, 1, 2)
        points = pixels(input).unsqueeze(2) + column + layer.taps.reshape(taps, 2) + offset
        samples = sampled(input, points).transpose(3, 4).flatten(2, 3)
        return F.conv2d(samples, layer.conv.weight, layer.conv.bias, stride=(taps, 1))

    return Case([torch.randn(1, channels, *size)], theirs, layer)


def upsampling(tiny: bool) -> Case:
    channels, size = (8, (4, 5)) if tiny else (64, (96, 96))
    layer = _moving(dknn.DySample(channels, scale=2, groups=4))

    def theirs(layer: Any, input: Tensor) -> Tensor:
        batch, groups, scale = len(input), layer.groups, layer.scale
        # [B, G*2, scale*H, scale*W], h before w.
        offset = F.pixel_shuffle(layer.offset_head(input) / 4, scale)
        points = offset.reshape(batch * groups, 2, *offset.shape[2:]).movedim(1, -1)
        points = points + (pixels(offset) + 0.5) / scale - 0.5
        return sampled(input.reshape(batch * groups, -1, *input.shape[2:]), points).reshape(
            batch, -1, *offset.shape[2:]
        )

    return Case([torch.randn(1, channels, *size)], theirs, layer)


def guided(tiny: bool) -> Case:
    dim, heads, size = (8, 2, (5, 6)) if tiny else (144, 12, (64, 64))
    layer = _moving(dknn.GuidedDeformAttn(dim, heads))

    def theirs(layer: Any, input: Tensor, source: Tensor, flow: Tensor) -> Tensor:
        (batch, frames), size, taps = source.shape[:2], input.shape[2:], layer.kernel_size
        aligned = pixels(input) + flow.flatten(0, 1).movedim(1, -1)
        warped = sampled(source.flatten(0, 1), aligned, "zeros")
        repeated = input.unsqueeze(1).expand_as(source).flatten(0, 1)
        raw = layer.offset_head(torch.cat([repeated, warped, flow.flatten(0, 1)], 1))
        offset = layer.max_offset * raw.tanh().unflatten(1, (layer.heads, -1, 2)).permute(0, 4, 5, 1, 2, 3)
        window = torch.stack(torch.meshgrid(*[torch.arange(k) - k // 2 for k in taps], indexing="ij"), -1).to(input)
        points = aligned[:, :, :, None, None] + window.flatten(0, 1) + offset
        # [B, Q, H, T, K, 2], x first.
        locations = ((points + 0.5) / points.new_tensor(list(size))).flip(-1).flatten(1, 2)
        locations = locations.unflatten(0, (batch, frames)).permute(0, 2, 3, 1, 4, 5)
        tokens = source.flatten(3).transpose(2, 3).flatten(1, 2)
        query = layer.query_proj(input.flatten(2).transpose(1, 2)).unflatten(-1, (layer.heads, -1))
        key, value = (
            project(tokens).unflatten(-1, (layer.heads, -1)) for project in (layer.key_proj, layer.value_proj)
        )
        output = layer.output_proj(_guided(tuple(size), query, key, value, locations))
        return output.transpose(1, 2).unflatten(2, size)

    inputs = [torch.randn(1, dim, *size), torch.randn(1, 2, dim, *size), 2 * torch.randn(1, 2, 2, *size)]
    return Case(inputs, theirs, layer)


def guided_points(tiny: bool) -> Case:
    """What lies between the projections of guided attention."""
    heads, channels, size = (2, 4, (5, 6)) if tiny else (12, 12, (64, 64))
    frames, taps, count = 2, 9, size[0] * size[1]
    levels = [size] * frames

    def ours(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, locations: Tensor) -> Tensor:
        scores = deform_correlate(query / sqrt(query.shape[-1]), key, levels, locations)
        return ms_deform_attn(value, levels, locations, scores.flatten(3).softmax(-1).view_as(scores))

    def theirs(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, locations: Tensor) -> Tensor:
        return _guided(size, query, key, value, locations)

    centre = ((pixels(torch.empty(1, 1, *size)) + 0.5) / torch.tensor(size)).flip(-1).reshape(1, count, 1, 1, 1, 2)
    locations = centre + 3 / max(size) * torch.randn(1, count, heads, frames, taps, 2)
    fields = [torch.randn(1, length, heads, channels) for length in (count, frames * count, frames * count)]
    return Case([*fields, locations], theirs, nn.Identity(), ours)


def _guided(size: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor, locations: Tensor) -> Tensor:
    """All samples of ``key`` and ``value [B, T*Q, H, D]``, then a softmax over frames and points."""
    batch, count, heads, frames, taps, _ = locations.shape
    grid = (2 * locations - 1).permute(0, 3, 2, 1, 4, 5).reshape(batch * frames * heads, count, taps, 2)
    keys, values = (
        F.grid_sample(
            field.unflatten(1, (frames, -1)).permute(0, 1, 3, 4, 2).reshape(len(grid), -1, *size),
            grid,
            align_corners=False,
        ).unflatten(0, (batch, frames, heads))
        for field in (key, value)
    )
    # [B, T, H, D, Q, K] and [B, T, H, Q, K].
    query = query.permute(0, 2, 3, 1) / sqrt(query.shape[-1])
    scores = (keys * query[:, None, ..., None]).sum(3)
    weights = scores.permute(0, 2, 3, 1, 4).flatten(3).softmax(-1).unflatten(3, (frames, taps)).permute(0, 3, 1, 2, 4)
    return (values * weights.unsqueeze(3)).sum((1, 5)).permute(0, 3, 1, 2).flatten(2)


CAMERAS, GROUPS = 6, 8


def _sizes_of_views(tiny: bool) -> tuple[list[tuple[int, int]], int, int, int]:
    """The maps of a camera, channels, queries and their points."""
    if tiny:
        return [(4, 6), (2, 3)], 16, 5, 3
    return [(64, 176), (32, 88), (16, 44), (8, 22)], 256, 900, 13


def views(tiny: bool) -> Case:
    scales, dim, queries, points = _sizes_of_views(tiny)
    layer = dknn.DeformableAggregation(dim, CAMERAS, len(scales), points, GROUPS)

    def ours(layer: Any, query: Tensor, value: Tensor, points: Tensor) -> Tensor:
        return layer(query, value, scales * CAMERAS, points)

    def theirs(layer: Any, query: Tensor, value: Tensor, points: Tensor) -> Tensor:
        return layer.output_proj(_views(scales, value, points, layer.weights(query)))

    fields = [torch.randn(1, queries, dim), torch.randn(1, CAMERAS * sum(h * w for h, w in scales), dim)]
    return Case([*fields, _seen_by_some(queries, points)], theirs, layer, ours)


def view_points(tiny: bool) -> Case:
    """What lies between the linear layers of the aggregation of views."""
    scales, dim, queries, points = _sizes_of_views(tiny)

    def ours(layer: nn.Module, value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return aggregate_views(value.unflatten(-1, (GROUPS, -1)), scales * CAMERAS, points, weights)

    def theirs(layer: nn.Module, value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return _views(scales, value, points, weights)

    value = torch.randn(1, CAMERAS * sum(h * w for h, w in scales), dim)
    weights = torch.rand(1, queries, CAMERAS, len(scales), points, GROUPS)
    return Case([value, _seen_by_some(queries, points), weights], theirs, nn.Identity(), ours)


def _seen_by_some(queries: int, points: int) -> Tensor:
    """Where each camera sees the points: 0 to 1 along both axes for four in ten."""
    return torch.rand(1, queries, points, CAMERAS, 2) * 1.6 - 0.3


def _views(scales: list[tuple[int, int]], value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """All samples of ``value [B, S, C]``, a call for each scale, and their sum with ``weights [B, Q, V, L, P, G]``."""
    batch, queries, taps, cameras, _ = points.shape
    maps = value.split([height * width for height, width in scales * cameras], 1)
    grid = 2 * points.permute(0, 3, 1, 2, 4).reshape(batch * cameras, queries, taps, 2) - 1
    samples = []
    for scale, (height, width) in enumerate(scales):
        images = torch.stack(maps[scale :: len(scales)], 1).transpose(2, 3).reshape(len(grid), -1, height, width)
        samples.append(F.grid_sample(images, grid, align_corners=False).unflatten(0, (batch, cameras)))
    seen = ((points > 0) & (points < 1)).all(-1).transpose(2, 3)[:, :, :, None, :, None]
    # [B, V, L, G, D, Q, P], and the weights alike.
    groups = torch.stack(samples, 2).unflatten(3, (weights.shape[-1], -1))
    share = (weights * seen).permute(0, 2, 3, 5, 1, 4).unsqueeze(4)
    return (groups * share).sum((1, 2, 6)).permute(0, 3, 1, 2).flatten(2)


def _moving(layer: nn.Module) -> Any:
    """``layer`` with offsets off the pixels, where rounding would decide the derivative."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "offset_head" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return layer


CASES: dict[str, Callable[[bool], Case]] = {
    "GuidedDeformAttn": guided,
    "guided attention at points": guided_points,
    "DeformableAggregation": views,
    "aggregation of views at points": view_points,
    "Warp3d": warp,
    "SoftmaxSplat": splat,
    "SnakeConv2d": snake,
    "LDConv2d": linear_taps,
    "DySample": upsampling,
}
