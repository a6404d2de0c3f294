"""Deformable attention of vision transformers, and aggregation of several views, against their formulas."""

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, evaluate

SIZE = (9, 6, 5)


class ByLoops(nn.Module):
    def __init__(self, layer: dk.nn.DeformableAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return attention_by_loops(self.layer, input)


def attention_by_loops(layer: dk.nn.DeformableAttention, input: Tensor) -> Tensor:
    """One group and one head after the other; samples by the reference of sampling."""
    points = layer.sampling_points(input)
    size, groups, heads = input.shape[2:], layer.offset_groups, layer.heads
    samples = dk.reference.deform_sample(input, points.flatten(2, -2), "zeros", "linear")
    grid = points.shape[2:-1]
    key, value = (p(samples.unflatten(2, grid)).flatten(2) for p in (layer.key_proj, layer.value_proj))
    query = layer.query_proj(input).flatten(2)
    along = [torch.arange(n).to(points.dtype) for n in size]
    place = torch.stack(torch.meshgrid(*along, indexing="ij"), -1).reshape(-1, len(size))
    channels, outputs = layer.dim // heads, []
    for head in range(heads):
        part = slice(head * channels, (head + 1) * channels)
        logits = torch.einsum("bcq,bck->bqk", query[:, part], key[:, part]) / sqrt(channels)
        group, inner = divmod(head, heads // groups)
        distance = place[:, None] - points[:, group].flatten(1, -2)[:, None]
        if layer.bias_head is not None:
            logits = logits + layer.bias_head(distance.sign() * (1 + distance.abs()).log())[..., inner]
        outputs.append(torch.einsum("bqk,bck->bcq", logits.softmax(-1), value[:, part]))
    return layer.output_proj(torch.cat(outputs, 1).unflatten(2, size))


@pytest.mark.parametrize("options", [{}, {"position_bias": False, "downsample_factor": 3, "kernel_size": 3}], ids=str)
def test_attention_is_its_formula(axes: int, options: dict[str, Any]) -> None:
    options = {"downsample_factor": 2, **options}
    layer = dk.nn.DeformableAttention(8, heads=4, offset_groups=2, spatial_dims=axes, **options).double()
    torch.nn.init.normal_(layer.offset_head[2].weight, std=0.5)
    # A softmax does not depend on these two.
    names = [name for name, _ in layer.named_parameters() if name not in ("key_proj.bias", "bias_head.2.bias")]
    values = [torch.randn(2, 8, *SIZE[:axes]).double(), *(layer.get_parameter(name).detach() for name in names)]

    def at(module: nn.Module, prefix: str = "") -> Any:
        return lambda input, *parameters: functional_call(
            module, {prefix + name: value for name, value in zip(names, parameters, strict=True)}, (input,)
        )

    which = list(range(len(values)))
    actual = evaluate(at(layer), values, which, torch.float64)
    expected = evaluate(at(ByLoops(layer), "layer."), values, which, torch.float64)
    for name, one, truth in zip(["output", "input", *names], actual, expected, strict=True):
        assert_close(one, truth, name=name)


def test_new_keys_lie_at_the_middle_of_blocks() -> None:
    layer = dk.nn.DeformableAttention(4, heads=2, downsample_factor=4).double()
    points = layer.sampling_points(torch.randn(1, 4, 8, 12).double())
    along = torch.meshgrid(torch.tensor([1.5, 5.5]), torch.tensor([1.5, 5.5, 9.5]), indexing="ij")
    assert_close(points[0, 0], torch.stack(along, -1).double())


def test_attention_arguments_that_are_wrong() -> None:
    layer = dk.nn.DeformableAttention(4, heads=2)
    for input, message in (
        (torch.zeros(1, 3, 8, 8), "input has 3 channels; this layer has dim=4"),
        (torch.zeros(1, 4, 3, 8), "with downsample_factor=4 every axis needs"),
        (torch.zeros(1, 4, 8), "it must have 4 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(input)
    wrong: dict[str, dict[str, Any]] = {
        "dim is 4; it must be divisible by heads": {"heads": 3},
        "heads is 2; it must be divisible by offset_groups": {"heads": 2, "offset_groups": 4},
        "kernel_size is 5; it must differ": {"heads": 2, "kernel_size": 5},
        "max_offset is -1": {"heads": 2, "max_offset": -1},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            dk.nn.DeformableAttention(4, **options)


SHAPES = [(5, 8), (3, 4)] * 3
"""Three cameras of two scales."""


def aggregated(layer: dk.nn.DeformableAggregation, query: Tensor, value: Tensor, points: Tensor) -> Tensor:
    """Every camera and scale by itself, in torch's sampler."""
    weights, start, total = layer.weights(query), 0, torch.zeros((), dtype=query.dtype)
    for level, (height, width) in enumerate(SHAPES):
        camera, scale = divmod(level, 2)
        field = value[:, start : start + height * width].transpose(1, 2).unflatten(2, (height, width))
        place = points[:, :, :, camera]
        samples = F.grid_sample(field, 2 * place - 1, align_corners=False).permute(0, 2, 3, 1)
        seen = ((place > 0) & (place < 1)).all(-1, keepdim=True)
        share = weights[:, :, camera, scale].unsqueeze(-1)
        total = total + (samples.unflatten(-1, (layer.groups, -1)) * share * seen.unsqueeze(-1)).sum(2).flatten(2)
        start += height * width
    return layer.output_proj(total)


def views() -> tuple[dk.nn.DeformableAggregation, list[Tensor]]:
    layer = dk.nn.DeformableAggregation(12, num_cameras=3, num_scales=2, num_points=4, groups=3).double()
    torch.nn.init.normal_(layer.weights_fc.weight)
    length = sum(height * width for height, width in SHAPES)
    query, value = torch.randn(2, 7, 12).double(), torch.randn(2, length, 12).double()
    return layer, [query, value, torch.rand(2, 7, 4, 3, 2).double() * 2 - 0.5]


def test_aggregation_is_its_formula() -> None:
    layer, values = views()
    actual = evaluate(lambda q, v, p: layer(q, v, SHAPES, p), values, [0, 1, 2], torch.float64)
    expected = evaluate(lambda *v: aggregated(layer, *v), values, [0, 1, 2], torch.float64)
    for name, one, truth in zip(("output", "query", "value", "points"), actual, expected, strict=True):
        assert_close(one, truth, name=name)


def test_points_that_no_camera_sees_add_nothing() -> None:
    layer, (query, value, points) = views()
    points[0, :, 1] = torch.nan
    points[1, :, 2] = torch.inf
    result = layer(query, value, SHAPES, points.requires_grad_())
    (grad,) = torch.autograd.grad(result.sum(), points)
    assert result.isfinite().all() and grad.isfinite().all()
    points = points.detach()
    assert_close(result, layer(query, value, SHAPES, torch.where(points.isfinite(), points, -5.0)).double())


def test_points_that_most_cameras_do_not_see_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key point lies in one camera, or in two: no warning says that its locations are in other units."""
    monkeypatch.setitem(dk.ops._suspect.looks_left, "locations", 9)
    layer, (query, value, points) = views()
    points[:, :, :, 1:] += 5
    layer(query, value, SHAPES, points)
    assert not dk.ops._suspect.given


def test_aggregation_arguments_that_are_wrong() -> None:
    layer, (query, value, points) = views()
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((query[..., :3], value, SHAPES, points), ValueError, r"query has shape .* it must be \[B, Q, 12\]"),
        ((query, value, SHAPES[:4], points), ValueError, "has 4 levels; this layer needs 6 = 3 cameras x 2 scales"),
        ((query, value, SHAPES, points[:, :, :3]), ValueError, r"points must be \[2, 7, 4, 3, 2\]"),
        ((query, value, SHAPES, points.half()), TypeError, "points has dtype torch.float16"),
    ]
    for args, error, message in wrong:
        with pytest.raises(error, match=message):
            layer(*args)
