"""The layers DCNv3 and DCNv4 are compared with the forward of the published ones, in the published convention."""

import copy
import io
import math
import pickle
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

LAYERS = {"DCNv3": dk.nn.DCNv3, "DCNv4": dk.nn.DCNv4}
CONVERT = {"DCNv3": dk.nn.dcnv3_state_dict, "DCNv4": dk.nn.dcnv4_state_dict}
SIZE = (7, 6, 5)
both = pytest.mark.parametrize("name", LAYERS)


def build(name: str, *args: Any, std: float = 0.3, **options: Any) -> nn.Module:
    """A layer all of whose parameters are random."""
    layer = LAYERS[name](*args, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer


def image(axes: int, channels: int = 8, **options: Any) -> Tensor:
    return torch.randn(2, *SIZE[:axes], channels, **options)


# The published layers


def published_aggregate(value: Tensor, offset: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """``value [N, H, W, G, C]``, ``offset [N, H, W, G, K, 2]`` as (x, y) and ``mask [N, H, W, G, K]``, column after
    column: for each tap the four pixels around its point are gathered out of a frame of zeros."""
    kernel, dilation, pad = (options.get(k, d) for k, d in (("kernel_size", 3), ("dilation", 1), ("pad", 1)))
    scale, frame = options.get("offset_scale", 1.0), 20
    images, height, width, groups, _ = value.shape
    half = dilation * (kernel - 1) // 2
    taps = [(i, j) for i in range(kernel) for j in range(kernel)]
    if options.get("remove_center"):
        taps.remove((kernel // 2, kernel // 2))
    rows, columns = torch.arange(height).reshape(1, -1, 1, 1), torch.arange(width).reshape(1, 1, -1, 1)
    image, group = torch.arange(images).reshape(-1, 1, 1, 1), torch.arange(groups)
    framed = F.pad(value, [0, 0, 0, 0, frame, frame, frame, frame])
    total = torch.zeros_like(value)
    for number, (i, j) in enumerate(taps):
        x = columns - pad + half - half * scale + (i * dilation + offset[..., number, 0]) * scale
        y = rows - pad + half - half * scale + (j * dilation + offset[..., number, 1]) * scale
        left, top = x.detach().floor(), y.detach().floor()
        assert left.abs().max() < frame and top.abs().max() < frame, "a point beyond the frame"
        for right, lower in product((0, 1), repeat=2):
            share = (x - left if right else 1 - (x - left)) * (y - top if lower else 1 - (y - top))
            pixel = framed[image, (top + lower + frame).long(), (left + right + frame).long(), group]
            total = total + (mask[..., number] * share).unsqueeze(-1) * pixel
    return total


def blend(x: Tensor, x_proj: Tensor, query: Tensor, state: dict[str, Tensor], group: int) -> Tensor:
    scale = F.linear(query, state["center_feature_scale_proj_weight"], state["center_feature_scale_proj_bias"])
    scale = scale.sigmoid()[..., None].expand(*scale.shape, x.shape[-1] // group).flatten(-2)
    return x * (1 - scale) + x_proj * scale


def published_dcnv3(state: dict[str, Tensor], input: Tensor, group: int, options: dict[str, Any]) -> Tensor:
    x = F.linear(input, state["input_proj.weight"], state["input_proj.bias"])
    depthwise = state["dw_conv.0.weight"]
    padding = (depthwise.shape[-1] - 1) // 2
    x1 = F.conv2d(input.permute(0, 3, 1, 2), depthwise, state["dw_conv.0.bias"], 1, padding, 1, len(depthwise))
    if options.get("norm_layer") == "BN":
        mean, var = x1.mean((0, 2, 3)), x1.var((0, 2, 3), correction=0)
        x1 = (x1.permute(0, 2, 3, 1) - mean) / (var + 1e-5).sqrt()
        x1 = x1 * state["dw_conv.1.0.weight"] + state["dw_conv.1.0.bias"]
    else:
        x1 = x1.permute(0, 2, 3, 1)
        mean, var = x1.mean(-1, keepdim=True), x1.var(-1, keepdim=True, correction=0)
        x1 = (x1 - mean) / (var + 1e-6).sqrt() * state["dw_conv.1.1.weight"] + state["dw_conv.1.1.bias"]
    x1 = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}[options.get("act_layer", "GELU")](x1)
    offset = F.linear(x1, state["offset.weight"], state["offset.bias"]).unflatten(-1, (group, -1, 2))
    mask = F.linear(x1, state["mask.weight"], state["mask.bias"]).unflatten(-1, (group, -1)).softmax(-1)
    aggregated = published_aggregate(x.unflatten(-1, (group, -1)), offset, mask, options).flatten(-2)
    if options.get("center_feature_scale"):
        aggregated = blend(aggregated, x, x1, state, group)
    return F.linear(aggregated, state["output_proj.weight"], state["output_proj.bias"])


def published_dcnv4(state: dict[str, Tensor], input: Tensor, group: int, options: dict[str, Any]) -> Tensor:
    x = query = input
    if not options.get("without_pointwise"):
        x = F.linear(input, state["value_proj.weight"], state["value_proj.bias"])
    if "dw_kernel_size" in options:
        depthwise, padding = state["offset_mask_dw.weight"], (options["dw_kernel_size"] - 1) // 2
        query = F.conv2d(
            input.permute(0, 3, 1, 2), depthwise, state["offset_mask_dw.bias"], 1, padding, 1, len(depthwise)
        ).permute(0, 2, 3, 1)
    packed = F.linear(query, state["offset_mask.weight"], state["offset_mask.bias"])
    assert packed.shape[-1] % 8 == 0
    taps = options.get("kernel_size", 3) ** 2 - options.get("remove_center", False)
    offsets = [packed[..., g * 3 * taps : g * 3 * taps + 2 * taps].unflatten(-1, (taps, 2)) for g in range(group)]
    masks = [packed[..., g * 3 * taps + 2 * taps : (g + 1) * 3 * taps] for g in range(group)]
    by_group = x.unflatten(-1, (group, -1))
    aggregated = published_aggregate(by_group, torch.stack(offsets, 3), torch.stack(masks, 3), options).flatten(-2)
    if options.get("center_feature_scale"):
        aggregated = blend(aggregated, x, aggregated, state, group)
    if options.get("without_pointwise"):
        return aggregated
    return F.linear(aggregated, state["output_proj.weight"], state.get("output_proj.bias"))


PUBLISHED = {"DCNv3": published_dcnv3, "DCNv4": published_dcnv4}
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("DCNv3", {}),
    ("DCNv3", {"offset_scale": 2.0, "dw_kernel_size": 5}),
    ("DCNv3", {"remove_center": True, "act_layer": "SiLU"}),
    ("DCNv3", {"center_feature_scale": True, "norm_layer": "BN", "offset_scale": 0.5}),
    ("DCNv3", {"kernel_size": 5, "pad": 4, "dilation": 2, "act_layer": "ReLU", "dw_kernel_size": 3}),
    ("DCNv3", {"kernel_size": 5, "pad": 2, "remove_center": True, "center_feature_scale": True, "offset_scale": 1.5}),
    ("DCNv4", {}),
    ("DCNv4", {"offset_scale": 0.5, "dw_kernel_size": 3}),
    ("DCNv4", {"remove_center": True, "output_bias": False}),
    ("DCNv4", {"center_feature_scale": True, "without_pointwise": True}),
    ("DCNv4", {"kernel_size": 5, "pad": 2, "remove_center": True, "center_feature_scale": True, "dw_kernel_size": 5}),
    ("DCNv4", {"pad": 2, "dilation": 2}),
]


def configuration_id(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items()) or "default"
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=configuration_id)
def test_a_published_checkpoint_gives_the_published_layer(name: str, options: dict[str, Any], group: int) -> None:
    layer = build(name, 8, group=group, dtype=torch.float64, std=0.2, **options)
    window = {"kernel_size": options.get("kernel_size", 3), "remove_center": options.get("remove_center", False)}
    # The random values stand for those of a published layer; our layer gets them converted.
    published = {key: v.detach().clone() for key, v in layer.state_dict().items()}
    converted = CONVERT[name](published, group=group, **window)
    layer.load_state_dict(converted, strict=True)
    head = "offset.weight" if name == "DCNv3" else "offset_mask.weight"
    assert not torch.equal(converted[head], published[head])

    theirs = {key: published[key].requires_grad_() for key, _ in layer.named_parameters()}
    input = image(2, dtype=torch.float64).requires_grad_()
    expected = PUBLISHED[name](theirs, input, group, options)
    output = layer(input)
    assert_close(output.detach(), expected.detach())

    cotangent = torch.randn_like(expected)
    wanted = dict(
        zip(["input", *theirs], torch.autograd.grad(expected, [input, *theirs.values()], cotangent), strict=True)
    )
    ours = dict(layer.named_parameters())
    found = dict(zip(["input", *ours], torch.autograd.grad(output, [input, *ours.values()], cotangent), strict=True))
    found = {"input": found["input"], **CONVERT[name](found, group=group, **window)}
    for key, gradient in wanted.items():
        assert gradient.any() or key == "mask.bias", key
        assert_close(found[key], gradient, name=f"gradient of {key}")


@both
def test_names_and_shapes_of_the_parameters(name: str) -> None:
    """The names and shapes are those of the published modules with all options."""
    options = {"dw_kernel_size": 5, "center_feature_scale": True, "remove_center": True}
    shapes = {key: tuple(v.shape) for key, v in LAYERS[name](64, group=4, **options).state_dict().items()}
    common = {"center_feature_scale_proj_weight": (4, 64), "center_feature_scale_proj_bias": (4,)}
    common |= {"output_proj.weight": (64, 64), "output_proj.bias": (64,)}
    if name == "DCNv3":
        expected = {
            "dw_conv.0.weight": (64, 1, 5, 5),
            "dw_conv.0.bias": (64,),
            "dw_conv.1.1.weight": (64,),
            "dw_conv.1.1.bias": (64,),
            "offset.weight": (64, 64),
            "offset.bias": (64,),
            "mask.weight": (32, 64),
            "mask.bias": (32,),
            "input_proj.weight": (64, 64),
            "input_proj.bias": (64,),
        }
        norms = [key for key in LAYERS[name](norm_layer="BN").state_dict() if key.startswith("dw_conv.1")]
        assert norms == [
            f"dw_conv.1.0.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]
    else:
        expected = {
            "offset_mask_dw.weight": (64, 1, 5, 5),
            "offset_mask_dw.bias": (64,),
            "offset_mask.weight": (96, 64),
            "offset_mask.bias": (96,),
            "value_proj.weight": (64, 64),
            "value_proj.bias": (64,),
        }
        assert LAYERS[name](64, group=1).offset_mask.out_features == 32  # 27 are used
    assert shapes == {**expected, **common}


# Any number of axes


@pytest.mark.parametrize("axes", [1, 2])
@both
@pytest.mark.parametrize("options", [{}, {"center_feature_scale": True, "remove_center": True, "offset_scale": 2.0}])
def test_a_unit_axis_changes_nothing(axes: int, name: str, options: dict[str, Any]) -> None:
    """A layer with k axes equals the layer with k+1 axes whose kernel has size 1 along the last."""
    layer = build(name, 8, spatial_dims=axes, dw_kernel_size=3, dtype=torch.float64, **options)
    window = {"kernel_size": [3] * axes + [1], "pad": [1] * axes + [0], "dw_kernel_size": [3] * axes + [1]}
    lifted = LAYERS[name](8, spatial_dims=axes + 1, dtype=torch.float64, **window, **options)
    state = layer.state_dict()
    taps = 3**axes - bool(options)
    for key in ("weight", "bias"):
        if name == "DCNv3":
            offset = state[f"offset.{key}"].unflatten(0, (4, taps, axes))
            state[f"offset.{key}"] = insert_zeros(offset).flatten(0, 2)
        else:
            packed = state[f"offset_mask.{key}"]
            used = packed[: 4 * taps * (axes + 1)].unflatten(0, (4, taps * (axes + 1)))
            offset, mask = used[:, : taps * axes].unflatten(1, (taps, axes)), used[:, taps * axes :]
            wider = torch.cat([insert_zeros(offset).flatten(1, 2), mask], 1).flatten(0, 1)
            state[f"offset_mask.{key}"] = torch.zeros_like(lifted.state_dict()[f"offset_mask.{key}"])
            state[f"offset_mask.{key}"][: len(wider)] = wider
        depthwise = {"DCNv3": "dw_conv.0.weight", "DCNv4": "offset_mask_dw.weight"}[name]
    state[depthwise] = state[depthwise].unsqueeze(-1)
    lifted.load_state_dict(state)
    input = image(axes, dtype=torch.float64)
    assert_close(lifted(input.unsqueeze(-2)).squeeze(-2), layer(input))


def insert_zeros(offset: Tensor) -> Tensor:
    """``[G, K, N, ...]`` with an additional last coordinate of zero."""
    return torch.cat([offset, torch.zeros_like(offset[:, :, :1])], 2)


def test_a_new_dcnv3_averages_the_window(axes: int) -> None:
    layer = dk.nn.DCNv3(8, spatial_dims=axes, dtype=torch.float64)
    input = image(axes, dtype=torch.float64)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    mean = pool(layer.input_proj(input).movedim(-1, 1), 3, 1, 1).movedim(1, -1)
    assert_close(layer(input), layer.output_proj(mean))


def test_a_new_dcnv4_gives_its_bias(axes: int) -> None:
    layer = dk.nn.DCNv4(8, spatial_dims=axes)
    nn.init.normal_(layer.output_proj.bias)
    output = layer(image(axes))
    assert_equal(output, layer.output_proj.bias.detach().expand_as(output))


@both
def test_it_learns(axes: int, name: str) -> None:
    """A new layer learns, and every parameter changes; the offsets of DCNv4 change one step after its masks."""
    layer = LAYERS[name](8, spatial_dims=axes, dw_kernel_size=3, center_feature_scale=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    input, losses = image(axes), []
    start = copy.deepcopy(layer.state_dict())
    for _ in range(8):
        loss = (layer(input) - input.flip(1)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    head = layer.offset if name == "DCNv3" else layer.offset_mask
    used = 4 * 3**axes * (axes if name == "DCNv3" else axes + 1)
    assert (head.weight[:used].abs().sum(1) > 0).all(), "every offset and every mask is learnt"
    for key, value in layer.state_dict().items():
        assert not torch.equal(value, start[key]), key


# Strides and sizes


@both
@pytest.mark.parametrize(
    "window",
    [
        {"stride": 2},
        {"stride": 3, "pad": 2},
        {"pad": 0},
        {"pad": 3},
        {"kernel_size": 4, "dw_kernel_size": 3, "pad": 1},
        {"kernel_size": 2, "dw_kernel_size": 3, "pad": 0, "stride": 2},
        {"dilation": 2, "stride": 2},
    ],
    ids=configuration_id,
)
def test_the_heads_are_read_at_the_centres_of_the_windows(axes: int, name: str, window: dict[str, Any]) -> None:
    """The offsets and masks of an output position are those of a layer with stride 1 at the centre of the window."""
    options = {"spatial_dims": axes, "center_feature_scale": True, "dtype": torch.float64}
    window = {"dw_kernel_size": 3, **window}
    layer = build(name, 8, **options, **window)
    input = image(axes, dtype=torch.float64)
    output = layer(input)
    k, s, p, d = (
        window.get(key, default) for key, default in (("kernel_size", 3), ("stride", 1), ("pad", 1), ("dilation", 1))
    )
    size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n in SIZE[:axes])
    assert output.shape == (2, *size, 8)

    index = [(torch.arange(o) * s - p + d * (k - 1) // 2).clamp(0, n - 1) for o, n in zip(size, SIZE, strict=False)]
    centres = (slice(None), *torch.meshgrid(*index, indexing="ij"))
    channels_first = input.movedim(-1, 1)
    dense = layer.dw_conv(channels_first) if name == "DCNv3" else layer.offset_mask_dw(channels_first).movedim(1, -1)
    features = dense[centres]
    if name == "DCNv3":
        expected = [layer.offset(features), layer.mask(features).unflatten(-1, (4, -1)).softmax(-1)]
    else:
        packed = layer.offset_mask(features)[..., : 4 * k**axes * (axes + 1)].unflatten(-1, (4, -1))
        expected = list(packed.split([k**axes * axes, k**axes], -1))
    offset, mask = layer.predict(input)
    assert_close(offset, expected[0].reshape(offset.shape))
    assert_close(mask, expected[1])

    value = layer.input_proj(input) if name == "DCNv3" else layer.value_proj(input)
    aggregated = dk.deform_aggregate(value.unflatten(-1, (4, -1)), offset, mask, k, s, p, d).flatten(-2)
    query = features if name == "DCNv3" else aggregated
    blended = blend(aggregated, value[centres], query, layer.state_dict(), 4)
    assert_close(output, layer.output_proj(blended))


@both
def test_sampling_locations_are_where_the_layer_reads(axes: int, name: str) -> None:
    """If the input holds its own coordinates, a mask that selects one tap returns the position of that tap."""
    window = {"kernel_size": 3, "stride": 2, "pad": 0, "dilation": 1, "offset_scale": 0.5, "remove_center": True}
    layer = LAYERS[name](1, group=1, spatial_dims=axes, **window)
    offset = torch.empty(1, *((n - 3) // 2 + 1 for n in SIZE[:axes]), 1, 3**axes - 1, axes, dtype=torch.float64)
    points = layer.sampling_locations(offset.uniform_(-0.9, 0.9))
    assert points.shape == offset.shape and points.dtype == torch.float64
    assert layer.sampling_locations(offset.bfloat16()).dtype == torch.float32
    for axis in range(axes):
        shape = [1, *(SIZE[axis] if i == axis else 1 for i in range(axes)), 1, 1]
        ramp = torch.arange(SIZE[axis], dtype=torch.float64).reshape(shape).expand(1, *SIZE[:axes], 1, 1)
        for tap in range(3**axes - 1):
            mask = torch.zeros(offset.shape[:-1], dtype=torch.float64)
            mask[..., tap] = 1
            read = dk.deform_aggregate(ramp, offset, mask, 3, 2, offset_scale=0.5, remove_center=True)
            assert_close(read[..., 0], points[..., tap, axis])


def test_flat_input(axes: int) -> None:
    layer = build("DCNv4", 8, spatial_dims=axes, stride=2)
    input = image(axes)
    expected = layer(input)
    assert_equal(layer(input.flatten(1, -2), shape=SIZE[:axes]), expected.flatten(1, -2))
    assert_equal(layer(input, shape=SIZE[:axes]), expected)
    assert_equal(layer(input.flatten(1, -2), SIZE[:axes]), expected.flatten(1, -2))


@both
def test_empty_batch(axes: int, name: str) -> None:
    layer = LAYERS[name](8, spatial_dims=axes, stride=2, center_feature_scale=True)
    output = layer(image(axes)[:0])
    assert output.shape == (0, *((n + 1) // 2 for n in SIZE[:axes]), 8)
    output.sum().backward()
    assert layer.output_proj.weight.grad is not None and not layer.output_proj.weight.grad.any()


# As modules


@both
def test_copies(axes: int, name: str) -> None:
    options = {"spatial_dims": axes, "stride": 2, "offset_scale": 0.5, "remove_center": True, "dw_kernel_size": 3}
    layer = build(name, 8, center_feature_scale=True, **options)
    input = image(axes)
    expected = layer(input)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    restored = LAYERS[name](8, center_feature_scale=True, **options)
    restored.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        assert_equal(other(input), expected)
        assert repr(other) == repr(layer)


def test_repr_shows_arguments_that_are_not_defaults() -> None:
    assert repr(dk.nn.DCNv4(64, without_pointwise=True)) == (
        "DCNv4(\n  64, kernel_size=(3, 3), stride=(1, 1), pad=(1, 1), group=4\n"
        "  (offset_mask): Linear(in_features=64, out_features=112, bias=True)\n)"
    )
    layer = dk.nn.DCNv3(8, dilation=2, offset_scale=0.5, center_feature_scale=True, remove_center=True, spatial_dims=1)
    for part in ("dilation=(2,)", "offset_scale=0.5", "center_feature_scale=True", "remove_center=True", "(dw_conv)"):
        assert part in repr(layer)


@both
def test_reset_parameters(axes: int, name: str) -> None:
    options = {"spatial_dims": axes, "dw_kernel_size": 3, "center_feature_scale": True}
    torch.manual_seed(3)
    fresh = LAYERS[name](8, **options)
    layer = build(name, 8, **options)
    layer.reset_parameters()
    for (key, value), other in zip(layer.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert value.any() == other.any(), key
        if value.any() and not torch.equal(other, torch.ones_like(other)):
            assert not torch.equal(value, other), f"{key} is drawn again"
            assert abs(value.std() - other.std()) < 0.5 * other.std(), key
    bound = math.sqrt(6 / 16)
    assert 0.8 * bound < layer.output_proj.weight.abs().max() <= bound


@both
def test_device_and_dtype(axes: int, name: str, dtype: torch.dtype) -> None:
    options = {
        "spatial_dims": axes,
        "dw_kernel_size": 3,
        "center_feature_scale": True,
        "device": "meta",
        "dtype": dtype,
    }
    layer = LAYERS[name](8, **options)
    assert {p.device.type for p in layer.parameters()} == {"meta"} and {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(image(axes, device="meta", dtype=dtype)).shape == (2, *SIZE[:axes], 8)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    output = real(image(axes, dtype=dtype))
    assert output.dtype == dtype and output.isfinite().all()


@both
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(axes: int, name: str, half: torch.dtype) -> None:
    layer = build(name, 8, spatial_dims=axes, center_feature_scale=True, std=0.1)
    input = image(axes)
    precise = layer(input).detach()
    with torch.autocast("cpu", half):
        output = layer(input)
    assert output.dtype == half
    error, size = (output.float() - precise).std(), precise.std()
    assert 0 < error < 0.2 * size
    output.float().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key


@pytest.mark.parametrize(("name", "axes", "dynamic"), [("DCNv3", 2, False), ("DCNv4", 1, True)])
def test_compile(name: str, axes: int, dynamic: bool) -> None:
    torch.compiler.reset()
    options = {"spatial_dims": axes, "center_feature_scale": True, "offset_scale": 0.5}
    model = nn.Sequential(build(name, 8, **options), build(name, 8, stride=2, **options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        input = torch.randn(batch, *SIZE[:axes], 8)
        expected = torch.autograd.grad(model(input).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(compiled(input).square().sum(), list(model.parameters()))
        assert_close(compiled(input).detach(), model(input).detach().double())
        for (key, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
            assert_close(one, other.double(), name=f"gradient of {key}")


@both
def test_export(axes: int, name: str) -> None:
    layer = build(name, 8, spatial_dims=axes, center_feature_scale=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (image(axes),), dynamic_shapes=({0: batch},))
    input = torch.randn(5, *SIZE[:axes], 8)
    assert_close(program.module()(input).detach(), layer(input).detach().double())
    assert [n for n in program.graph.nodes if n.target == torch.ops.deformkit.deform_aggregate.default]


# Errors

WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("both", {"channels": 0}, ValueError, "channels is 0; it must be at least 1"),
    ("both", {"channels": 8.0}, TypeError, "channels is 8.0; it must be an int"),
    ("both", {"group": -1}, ValueError, "group is -1; it must be at least 1"),
    ("both", {"group": 3}, ValueError, "channels is 64; it must be divisible by group, which is 3"),
    ("both", {"spatial_dims": 4}, ValueError, "spatial_dims is 4; it must be 1, 2 or 3"),
    ("both", {"kernel_size": (3, 3, 3)}, ValueError, "kernel_size is (3, 3, 3); it needs 2 values"),
    ("both", {"kernel_size": 0}, ValueError, "kernel_size is 0; each value must be at least 1"),
    ("both", {"stride": 0}, ValueError, "stride is 0; each value must be at least 1"),
    ("both", {"pad": -1}, ValueError, "pad is -1; each value must be at least 0"),
    ("both", {"pad": "same"}, TypeError, "pad is 'same'; it must be an int"),
    ("both", {"dilation": 1.5}, TypeError, "dilation is 1.5; it must be an int"),
    ("both", {"dw_kernel_size": 4}, ValueError, "dw_kernel_size is 4x4; it must be odd"),
    ("both", {"offset_scale": math.inf}, ValueError, "offset_scale is inf; it must be finite"),
    ("both", {"offset_scale": "2"}, TypeError, "offset_scale is '2'; it must be a real number"),
    ("both", {"kernel_size": 1, "remove_center": True}, ValueError, "kernel_size is 1x1; with remove_center no tap"),
    ("DCNv4", {"kernel_size": 2, "remove_center": True}, ValueError, "kernel_size is 2x2; with remove_center every"),
    ("DCNv3", {"kernel_size": 2}, ValueError, "dw_kernel_size is 2x2; it must be odd"),
    ("DCNv3", {"act_layer": "Tanh"}, ValueError, "act_layer is 'Tanh'; it must be one of 'GELU', 'SiLU', 'ReLU'"),
    ("DCNv3", {"norm_layer": "GN"}, ValueError, "norm_layer is 'GN'; it must be one of 'LN', 'BN'"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), WRONG, ids=configuration_id)
def test_a_wrong_argument_is_named(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    for layer in LAYERS.values() if name == "both" else (LAYERS[name],):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            layer(**options)


WRONG_INPUT: list[tuple[str, Sequence[int] | None, str]] = [
    ("2, 5, 6, 4", None, "input has 4 channels; this layer has channels=8"),
    ("2, 5, 6, 7, 8", None, "input has shape [2, 5, 6, 7, 8]; it must have 4 axes, the channels last"),
    ("2, 0, 6, 8", None, "input has spatial size 0x6; every axis must have at least one element"),
    ("2, 1, 6, 8", None, "output size is 0x"),
    ("2, 36, 8", None, "shape is None; an input of [2, 36, 8] needs the sizes of its spatial axes"),
    ("2, 36, 8", (5, 6), "input has 36 positions; shape 5x6 has 30"),
    ("2, 36, 8", (5, 6, 7), "shape is (5, 6, 7); it needs 2 values, one for each spatial axis"),
    ("2, 5, 6, 8", (6, 5), "shape is 6x5; input has spatial size 5x6"),
]


@pytest.mark.parametrize(("size", "shape", "message"), WRONG_INPUT)
def test_a_wrong_input_is_named(size: str, shape: Sequence[int] | None, message: str) -> None:
    input = torch.zeros([int(n) for n in size.split(", ")])
    options = {"pad": 0, "kernel_size": (2, 1), "dw_kernel_size": 3}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dk.nn.DCNv4(8, **options)(input, shape)
    if shape is None and not message.startswith("shape is"):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            dk.nn.DCNv3(8, **options)(input)


@both
def test_what_is_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=r"^input is a list; it must be a torch\.Tensor$"):
        LAYERS[name](8)([1.0])
    with pytest.raises(
        ValueError, match=re.escape("offset has shape [1, 2]; it must have 6 axes, the last three of 4x9x2")
    ):
        LAYERS[name](8).sampling_locations(torch.zeros(1, 2))


@pytest.mark.parametrize("kind", [dk.nn.DCNv3, dk.nn.DCNv4])
def test_channels_first_are_recognised(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"input has 30 channels; .*; channels come last here: input\.movedim"):
        kind(16, group=2)(torch.randn(2, 16, 20, 30))
