"""The layers of compat.deformops are compared with their formulas, and with deformops if a Python has it."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import assert_copied_compiled_and_halved, run_elsewhere
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal
from deformkit.compat.deformops import nn as old
from deformkit.compat.deformops.v3 import nn as v3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Such small layers spend most of their time waiting for threads, which is long on a busy machine.
    torch.set_num_threads(1)


def jittered(layer: nn.Module) -> nn.Module:
    """The layer in float64, with random parameters."""
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def image(channels: int = 8, height: int = 6, width: int = 7) -> Tensor:
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def gradients(function: Callable[..., Tensor], layer: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Output and gradients of the inputs and of the parameters of ``layer``, by name, for a fixed cotangent."""
    inputs = [value.detach().requires_grad_(value.is_floating_point()) for value in inputs]
    named = {f"input {i}": value for i, value in enumerate(inputs) if value.requires_grad}
    named |= dict(layer.named_parameters())
    output = function(*inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(output, list(named.values()), cotangent)
    return {"output": output.detach(), **dict(zip(named, grads, strict=True))}


def check(function: Callable[..., Tensor], layer: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Compare the layer with ``function`` of its parameters."""
    actual, expected = gradients(layer, layer, inputs), gradients(function, layer, inputs)
    for name, value in expected.items():
        assert_close(actual[name], value, name=name)


def aggregated(value: Tensor, offset: Tensor, mask: Tensor, window: dict[str, Any]) -> Tensor:
    """The formula of the published layers, with taps in column-major order and offsets as (x, y).

    Args:
        value: ``[N, H, W, C]``.
        offset: ``[N, Ho, Wo, G, K, 2]``.
        mask: ``[N, Ho, Wo, G, K]``.
        window: kernel_size, stride, dilation, scale and removed, of a layer that keeps the size at stride 1.
    """
    kernel, stride, dilation, scale = (window[name] for name in ("kernel_size", "stride", "dilation", "scale"))
    taps = [(column, row) for column in range(kernel) for row in range(kernel)]
    if window["removed"]:
        taps.remove((kernel // 2, kernel // 2))
    batch, out_height, out_width, groups = mask.shape[:4]
    height, width = value.shape[1:3]
    by_group = value.movedim(-1, 1).unflatten(1, (groups, -1)).flatten(0, 1)
    output = torch.zeros(batch * groups, by_group.shape[1], out_height, out_width, dtype=value.dtype)
    for k, (column, row) in enumerate(taps):
        points = []
        for axis, (size, place) in enumerate(((out_width, column), (out_height, row))):
            at = torch.arange(size, dtype=value.dtype) * stride
            at = at.reshape(1, -1) if axis == 0 else at.reshape(-1, 1)
            shift = offset[..., k, axis].movedim(-1, 1).flatten(0, 1)
            pixel = at + scale * (dilation * (place - (kernel - 1) / 2) + shift)
            points.append((2 * pixel + 1) / (width if axis == 0 else height) - 1)
        sampled = F.grid_sample(by_group, torch.stack(points, -1), padding_mode="zeros", align_corners=False)
        output = output + sampled * mask[..., k].movedim(-1, 1).flatten(0, 1).unsqueeze(1)
    return output.unflatten(0, (batch, groups)).flatten(1, 2).movedim(1, -1)


def gated(layer: nn.Module, out: Tensor, value: Tensor, stride: int) -> Tensor:
    if layer.center_scale is None:
        return out
    gate = torch.sigmoid(out @ layer.center_scale.scale_weight.T + layer.center_scale.scale_bias)
    gate = gate.repeat_interleave(out.shape[-1] // gate.shape[-1], -1)
    return out * (1 - gate) + value[:, ::stride, ::stride] * gate


WINDOWS = [
    {},
    {"kernel_size": 5, "groups": 2},
    {"offset_scale": 0.7, "softmax": True},
    {"remove_center": True, "center_feature_scale": True},
    {"stride": 2, "dilation": 2, "center_feature_scale": True, "project": None},
    {"kernel_size": 1, "groups": 8, "offset_scale": 2.0},
]


def of_window(options: dict[str, Any]) -> dict[str, Any]:
    window = {name: options.get(name, value) for name, value in {"kernel_size": 3, "stride": 1, "dilation": 1}.items()}
    return {
        **window,
        "scale": options.get("offset_scale", 1.0),
        "removed": options.get("remove_center", False),
    }


def written_out(layer: nn.Module, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The formula of the README's DeformConv2d at the parameters of ``layer``."""
    window, groups = of_window(options), options.get("groups", 4)
    taps = window["kernel_size"] ** 2 - window["removed"]

    def forward(input: Tensor) -> Tensor:
        stride = window["stride"]
        value = input.movedim(1, -1) if layer.proj_input is None else layer.proj_input(input.movedim(1, -1))
        depthwise = layer.offset_depthwise
        features = F.conv2d(
            input, depthwise.weight, depthwise.bias, padding=window["kernel_size"] // 2, groups=input.shape[1]
        )
        head = layer.offset_pointwise(features[..., ::stride, ::stride].movedim(1, -1))
        head = head[..., : groups * taps * 3].unflatten(-1, (groups, -1))
        offset, mask = head[..., : 2 * taps].unflatten(-1, (taps, 2)), head[..., 2 * taps :]
        out = aggregated(value, offset, mask.softmax(-1) if options.get("softmax") else mask, window)
        out = gated(layer, out, value, stride)
        return (out if layer.proj_output is None else layer.proj_output(out)).movedim(-1, 1)

    return forward


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_the_convolution_of_the_readme_is_its_formula(options: dict[str, Any]) -> None:
    layer = jittered(old.DeformConv2d(8, **options))
    check(written_out(layer, options), layer, [image()])


def test_the_example_of_the_readme() -> None:
    layer = old.DeformConv2d(16)
    y = layer(torch.randn((4, 16, 32, 64)))
    assert y.shape == (4, 16, 32, 64)
    y.sum().backward()
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "offset_depthwise.weight": [16, 1, 3, 3],
        "offset_depthwise.bias": [16],
        "offset_pointwise.weight": [112, 16],
        "offset_pointwise.bias": [112],
        "proj_input.weight": [16, 16],
        "proj_input.bias": [16],
        "proj_output.weight": [16, 16],
        "proj_output.bias": [16],
    }


def test_a_new_convolution_looks_straight_and_all_of_it_learns() -> None:
    layer = old.DeformConv2d(8, groups=2)
    input = torch.randn(2, 8, 6, 7)
    offset, mask = layer.predict(input)
    assert offset.shape == (2, 6, 7, 2, 9, 2)
    assert not offset.any()
    assert not mask.any()
    before = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(input) - input).square().mean().backward()
        optimizer.step()
    for (name, parameter), old_parameter in zip(layer.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(parameter, old_parameter), f"{name} has learnt nothing"


def test_points_are_given_in_the_order_of_the_operator() -> None:
    layer = old.DeformConv2d(8, groups=2, remove_center=True)
    with torch.no_grad():
        layer.offset_pointwise.bias.copy_(torch.arange(48.0))
    offset, mask = layer.predict(torch.zeros(1, 8, 5, 6))
    # The second tap in row-major order is the fourth in column-major order; its offset along y comes second.
    assert offset[0, 0, 0, 1, 1].tolist() == [24 + 2 * 3 + 1, 24 + 2 * 3]
    assert mask[0, 0, 0, 1].tolist() == [24 + 16 + tap for tap in (0, 3, 5, 1, 6, 2, 4, 7)]
    locations = layer.sampling_locations(torch.zeros_like(offset))
    assert locations[0, 2, 3, 0].tolist() == [[h, w] for h in (1, 2, 3) for w in (2, 3, 4) if (h, w) != (2, 3)]


@pytest.mark.parametrize("host", [old.DeformConv2d, v3.DeformSample2d])
@pytest.mark.parametrize("stride", [1, 2])
def test_tokens_are_images_in_another_layout(host: Callable[..., nn.Module], stride: int) -> None:
    layer = jittered(host(12, groups=3, stride=stride, activation=nn.SiLU()))
    input = image(12)
    expected = layer(input)
    tokens = layer(input.flatten(2).transpose(1, 2), shape=(6, 7))
    assert_equal(tokens, expected.flatten(2).transpose(1, 2))
    assert_equal(layer(input, shape=(6, 7)), expected)


def test_norm_and_activation_come_last() -> None:
    layer = jittered(old.DeformConv2d(8, norm=nn.BatchNorm2d(8), activation=nn.ReLU()))
    bare = copy.deepcopy(layer)
    bare.norm = bare.activation = None
    input = image()
    assert_equal(layer(input), layer.norm(bare(input)).relu())


def attention_written_out(layer: nn.Module, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The formula of DeformAttn2d of release 3 at the parameters of ``layer``."""
    names = {"spread": "offset_scale", "drop_center": "remove_center"}
    window = of_window({names.get(name, name): value for name, value in options.items()})
    taps, groups = window["kernel_size"] ** 2 - window["removed"], options.get("groups", 4)

    def forward(q: Tensor, v: Tensor) -> Tensor:
        value = v.movedim(1, -1) if layer.proj_value is None else layer.proj_value(v.movedim(1, -1))
        head = layer.proj_offset_mask(q.movedim(1, -1))[..., : groups * taps * 3].unflatten(-1, (groups, taps, 3))
        mask = head[..., 2].softmax(-1) if options.get("method") == "softmax" else head[..., 2]
        out = gated(layer, aggregated(value, head[..., :2], mask, window), value, window["stride"])
        return (out if layer.proj_output is None else layer.proj_output(out)).movedim(-1, 1)

    return forward


V3_WINDOWS = [
    {},
    {"kernel_size": 5, "groups": 2},
    {"spread": 0.7, "method": "softmax"},
    {"drop_center": True, "center_gate": True, "method": v3.MSDAMethod.LINEAR},
    {"stride": 2, "dilation": 2, "center_gate": True, "project": None},
]


@pytest.mark.parametrize("options", V3_WINDOWS, ids=str)
def test_single_scale_attention_is_its_formula(options: dict[str, Any]) -> None:
    layer = jittered(v3.DeformAttn2d(8, **options))
    stride = options.get("stride", 1)
    query = image(8, -(-6 // stride), -(-7 // stride))
    check(attention_written_out(layer, options), layer, [query, image()])
    sampler = jittered(v3.DeformSample2d(8, **options))

    def forward(input: Tensor) -> Tensor:
        return attention_written_out(sampler.sample, options)(sampler.offset(input), input)

    check(forward, sampler, [image()])


def test_query_and_value_may_come_in_different_layouts() -> None:
    layer = jittered(v3.DeformAttn2d(8))
    q, v = image(), image()
    expected = layer(q, v)
    tokens = [value.flatten(2).transpose(1, 2) for value in (q, v)]
    assert_equal(layer(q, tokens[1], shape=(6, 7)), expected)
    assert_equal(layer(tokens[0], v), expected.flatten(2).transpose(1, 2))
    assert_equal(layer(*tokens, shape=(6, 7)), expected.flatten(2).transpose(1, 2))


SHAPES = [(4, 6), (2, 3)]


def pyramid(boxes: bool = False) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    return (
        torch.randn(2, 5, 8, dtype=torch.float64),
        torch.rand(2, 5, 2, 4 if boxes else 2, dtype=torch.float64),
        torch.randn(2, 30, 8, dtype=torch.float64),
        SHAPES,
    )


RENAMED = {
    "sampling_offsets": "proj_offset",
    "attention_weights": "proj_weights",
    "value_proj": "proj_value",
    "output_proj": "proj_output",
}


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("host", [old.DeformAttn2d, v3.MultiScaleDeformAttn2d])
def test_multi_scale_attention_is_that_of_deformable_detr(host: Callable[..., nn.Module], boxes: bool) -> None:
    plain = dk.nn.MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3)
    layer = host(8, num_heads=2, num_levels=2, num_points=3)
    state = {f"{RENAMED[name.split('.')[0]]}.{name.split('.')[1]}": v for name, v in plain.state_dict().items()}
    fresh = layer.state_dict()
    assert list(fresh) == list(state)
    assert_equal(fresh["proj_offset.bias"], state["proj_offset.bias"])
    for name in ("proj_offset.weight", "proj_weights.weight", "proj_weights.bias", "proj_output.bias"):
        assert not fresh[name].any()
    jittered(plain)
    jittered(layer).load_state_dict(
        {f"{RENAMED[name.split('.')[0]]}.{name.split('.')[1]}": v for name, v in plain.state_dict().items()}
    )
    arguments = pyramid(boxes=boxes)
    padding = torch.rand(2, 30) < 0.3
    for mask in (None, padding):
        expected = plain(*arguments, None, mask)
        assert_close(layer(*arguments, torch.tensor([0, 24]), mask), expected.detach())
        as_tensor = (*arguments[:3], torch.tensor(SHAPES))
        assert_equal(layer(*as_tensor, None, mask), layer(*arguments, [0, 24], mask))


def test_state_dicts_of_deformable_detr_are_loaded_by_release_3() -> None:
    plain, layer = dk.nn.MSDeformAttn(8, 2, 2, 3), v3.MultiScaleDeformAttn2d(8, num_heads=2, num_levels=2, num_points=3)
    network = nn.Sequential(layer)
    published = {f"0.{name}": value for name, value in jittered(plain).float().state_dict().items()}
    network.load_state_dict(published)
    assert_equal(layer.proj_value.weight, plain.value_proj.weight)
    network.load_state_dict(network.state_dict())


def test_ways_to_weigh_points() -> None:
    arguments = pyramid()
    options = {"num_heads": 2, "num_levels": 2, "dim_value": 8, "dim_output": 6}
    layer = jittered(old.DeformAttn2d(8, **options))
    ways = {
        "softmax": lambda w: w.softmax(-1),
        "linear": lambda w: w,
        "rectified": lambda w: w.clamp(min=0) / (w.clamp(min=0).sum(-1, keepdim=True) + 1e-6),
    }
    results = []
    for name, function in ways.items():
        layer.method = name
        named = layer(*arguments)
        layer.method = function
        assert_equal(layer(*arguments), named)
        assert named.shape == (2, 5, 6)
        results.append(named)
        if name != "rectified":
            other = v3.MultiScaleDeformAttn2d(8, **options, method=name).double()
            other.load_state_dict(layer.state_dict())
            assert_equal(other(*arguments), named)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    assert old.MSDeformAttn2d is old.FusedMSDeformAttn2d is old.DeformAttn2d


def test_the_convolution_of_release_3_is_torchvisions() -> None:
    layer = v3.DeformConv2d(8, 4, (3, 1), 2, (1, 0), 1, 2, False, None).double()
    input, offset, mask = image(), torch.randn(2, 12, 3, 4).double(), torch.rand(2, 6, 3, 4).double()
    expected = dk.deform_conv2d(input, offset, layer.weight, None, 2, (1, 0), 1, mask)
    assert_equal(layer(input, offset, mask), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: old.DeformConv2d(10), "dims is 10; it must be divisible by groups, which is 4"),
        (lambda: old.DeformConv2d(8, groups=0), "groups is 0"),
        (lambda: old.DeformConv2d(8, 4), "kernel_size is 4; it must be odd"),
        (lambda: old.DeformConv2d(8, padding="valid"), "padding is 'valid'"),
        (lambda: old.DeformConv2d(8)(torch.rand(2, 4, 5, 6)), "input has 4 channels"),
        (lambda: old.DeformConv2d(8)(torch.rand(2, 8, 5)), "input has 5 channels"),
        (lambda: old.DeformConv2d(8)(torch.rand(2, 30, 8)), "shape is None"),
        (lambda: old.DeformConv2d(8)(torch.rand(2, 30, 8), (5, 5)), "input has 30 positions; shape is 5x5"),
        (lambda: old.DeformConv2d(8)(torch.rand(2, 8, 5, 6), (6, 5)), "input has spatial size 5x6; shape is 6x5"),
        (lambda: old.DeformConv2d(8)(torch.rand(8, 5)), r"input has shape \[8, 5\]"),
        (lambda: old.DeformConv2d(8, padding=0)(torch.rand(1, 8, 2, 2)), "output size is 0x0"),
        (lambda: v3.DeformAttn2d(10), "dim is 10; it must be divisible by groups"),
        (lambda: v3.DeformAttn2d(8, method="rectified"), "method is 'rectified'"),
        (lambda: v3.DeformAttn2d(8, 2, center_gate=True), "kernel_size is 2; with center_gate it must be odd"),
        (lambda: v3.DeformAttn2d(8, 2, drop_center=True), "kernel_size is 2x2; with remove_center"),
        (lambda: v3.DeformAttn2d(8)(torch.rand(1, 8, 4, 4), torch.rand(1, 8, 5, 5)), "q has spatial size 4x4; .* 5x5"),
        (lambda: old.DeformAttn2d(8, num_heads=3, num_levels=1), "dim is 8; it must be divisible by num_heads"),
        (lambda: old.DeformAttn2d(8, num_heads=0, num_levels=1), "num_heads is 0"),
        (lambda: old.DeformAttn2d(8, num_heads=2, num_levels=1, method="max"), "method is 'max'"),
        (lambda: attend(q=torch.rand(2, 5, 7)), r"q has shape \[2, 5, 7\]"),
        (lambda: attend(v=torch.rand(3, 30, 8)), "v has batch size 3; q has 2"),
        (lambda: attend(p=torch.rand(2, 5, 3, 2)), r"p has shape \[2, 5, 3, 2\]; it must be \[2, 5, 2, 2\]"),
        (lambda: attend(shapes=[(5, 6)]), "shapes has 1 levels; this layer has num_levels=2"),
        (lambda: attend(shapes=[(4, 6, 1), (2, 3, 1)]), "shapes has 3 columns; it must have 2, h and w"),
        (lambda: attend(level_index=[0, 20]), r"level_start_index is \[0, 20\]"),
        (lambda: attend(padding_mask=torch.ones(2, 29).bool()), r"padding_mask has shape \[2, 29\]"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def attend(**given: Any) -> Tensor:
    arguments = dict(zip(("q", "p", "v", "shapes"), (*(value.float() for value in pyramid()[:3]), SHAPES), strict=True))
    return old.DeformAttn2d(8, num_heads=2, num_levels=2)(**arguments | given)


LAYERS = {
    "conv": (lambda: old.DeformConv2d(8, remove_center=True, center_feature_scale=True, softmax=True), 1),
    "sample": (lambda: v3.DeformSample2d(8, center_gate=True), 1),
    "attention": (lambda: v3.DeformAttn2d(8), 2),
    "multi-scale": (lambda: v3.MultiScaleDeformAttn2d(8, num_heads=2, num_levels=2), 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compile_copy_and_run_in_lower_precision(name: str) -> None:
    make, count = LAYERS[name]
    layer = jittered(make()).float()
    values = pyramid() if count == 4 else [image() for _ in range(count)]
    arguments = [value.float() if isinstance(value, Tensor) else value for value in values]
    assert_copied_compiled_and_halved(layer, arguments)


DEFORMOPS = """
import sys, torch
from deformops import nn
results = []
for name, options, state, inputs, cotangent in torch.load(sys.argv[1]):
    layer = getattr(nn, name)(**options).double()
    layer.load_state_dict(state, strict=True)
    inputs = [value.requires_grad_(value.is_floating_point()) for value in inputs]
    named = {f"input {i}": value for i, value in enumerate(inputs) if value.requires_grad}
    named |= dict(layer.named_parameters())
    output = layer(*inputs)
    grads = torch.autograd.grad(output, list(named.values()), cotangent)
    results.append({"output": output.detach(), **dict(zip(named, grads, strict=True))})
torch.save(results, sys.argv[2])
"""

# deformops needs a multiple of 16 channels in each group, and a power of two in each head.
RIVAL_WINDOWS = [
    {},
    {"kernel_size": 5, "groups": 2, "spread": 1.5},
    {"kernel_size": 2, "padding": 1},
    {"drop_center": True, "method": "softmax"},
    {"stride": 2, "dilation": 2, "center_gate": True},
    {"stride": 3, "padding": 0, "center_gate": True, "project": None},
]


def rival_calls() -> list[tuple[str, dict[str, Any], list[Tensor]]]:
    calls: list[tuple[str, dict[str, Any], list[Tensor]]] = []
    for options in RIVAL_WINDOWS:
        sampler = v3.DeformSample2d(32, **{"groups": 2, **options}).double()
        query = torch.randn_like(sampler.offset(image(32)))
        calls.append(("DeformSample2d", {"dim": 32, "groups": 2, **options}, [image(32)]))
        calls.append(("DeformAttn2d", {"dim": 32, "groups": 2, **options}, [query, image(32)]))
    for boxes in (False, True):
        for method in ("softmax", "linear"):
            options = {"dim": 8, "num_heads": 2, "num_levels": 2, "num_points": 3, "method": method, "dim_output": 5}
            shapes = (torch.tensor(SHAPES), torch.tensor([0, 24]))
            calls.append(("MultiScaleDeformAttn2d", options, [*pyramid(boxes=boxes)[:3], *shapes]))
    options = {"in_channels": 8, "out_channels": 4, "kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "groups": 2}
    inputs = [image(), torch.randn(2, 24, 3, 8).double(), torch.rand(2, 12, 3, 8).double()]
    return [*calls, ("DeformConv2d", options, inputs), ("DeformConv2d", options, inputs[:2])]


@pytest.mark.skipif(
    "DEFORMKIT_DEFORMOPS_PYTHON" not in os.environ,
    reason="DEFORMKIT_DEFORMOPS_PYTHON does not name a Python with deformops",
)
def test_values_and_gradients_are_those_of_deformops(tmp_path: Path) -> None:
    calls, expected = [], []
    for name, options, inputs in rival_calls():
        layer = jittered(getattr(v3, name)(**options))
        expected.append(gradients(layer, layer, inputs))
        shape = expected[-1]["output"].shape
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        calls.append((name, options, dict(layer.state_dict()), inputs, cotangent))
    results = run_elsewhere("DEFORMKIT_DEFORMOPS_PYTHON", DEFORMOPS, calls, tmp_path)
    assert len(results) == len(expected)
    for call, actual, theirs in zip(calls, expected, results, strict=True):
        assert set(actual) == set(theirs)
        for name, value in theirs.items():
            assert_close(actual[name], value, name=f"{name} of {call[0]} {call[1]}")
