"""Names of mmcv against its formulas, which are written out here and in ``published``, and where somebody has mmcv with
its operators against those. The second truth for attention is transformers."""

import copy
from math import ceil
from typing import Any

import drawn
import published
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.compat import convert
from deformkit.compat import mmcv as compat
from deformkit.ops.deform_roi_pool.cases import CASES

ROI_CASES = [case for case in CASES if case.axes == 2]
PACKS = {"DCN": compat.DeformConv2dPack, "DCNv2": compat.ModulatedDeformConv2dPack}
packs = pytest.mark.parametrize("pack", PACKS)


def randomise(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.double()


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("seed", range(12))
def test_convolution(seed: int, modulated: bool) -> None:
    """Compare the value and every gradient."""
    case = drawn.conv(seed, modulated=modulated, **({} if modulated else {"bias": False}))
    named = case.arguments(torch.float64, seed=seed)
    steps = (named["stride"], named["padding"], named["dilation"], case.groups, case.offset_groups)
    names = ["input", "offset", "mask", "weight", "bias"]
    tensors = [named[name] for name in names]
    positions = [i for i, tensor in enumerate(tensors) if tensor is not None]

    def ours(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if modulated:
            return compat.modulated_deform_conv2d(input, offset, mask, weight, bias, *steps)
        return compat.deform_conv2d(input, offset, weight, *steps, False, 3)

    results = [
        evaluate(function, tensors, positions, torch.float64)
        for function in (ours, lambda *t: published.modulated_conv(*t, *steps))
    ]
    for name, *pair in zip(["output", *(names[i] for i in positions)], *results, strict=True):
        assert_close(*pair, name=name)


@pytest.mark.parametrize(
    "name", ["DeformConv2d", "ModulatedDeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2dPack"]
)
@pytest.mark.parametrize("seed", range(12))
def test_layers_of_mmcv_itself(seed: int, name: str) -> None:
    """Value and every gradient, of its layer, ours, and its own patched."""
    mmcv = pytest.importorskip("mmcv.ops")
    case = drawn.conv(seed, modulated=name.startswith("Modulated"), bias=False)
    named = case.arguments(torch.float64, seed=seed)
    steps = {step: tuple(named[step]) for step in ("stride", "padding", "dilation")}
    groups = {"groups": case.groups, "deform_groups": case.offset_groups}
    weight = named["weight"]
    shape = (weight.shape[1] * case.groups, weight.shape[0], tuple(weight.shape[2:]))
    theirs, ours = (getattr(host, name)(*shape, **steps, **groups, bias=False) for host in (mmcv, compat))
    ours.load_state_dict(randomise(theirs).state_dict())
    patched = copy.deepcopy(theirs)
    dk.patch(patched)
    given = ("input",) if "Pack" in name else ("input", "offset", "mask")
    tensors = [named[key] for key in given if named[key] is not None]

    def evaluate_layer(layer: nn.Module) -> list[Tensor]:
        leaves = [*(tensor.clone().requires_grad_() for tensor in tensors), *layer.parameters()]
        output = layer(*leaves[: len(tensors)])
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        return [output, *torch.autograd.grad(output, leaves, cotangent)]

    expected, *found = (evaluate_layer(layer) for layer in (theirs, ours.double(), patched))
    for results in found:
        for actual, value in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 1)])
def test_an_input_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    """mmcv pads input and offsets with zeros up to the kernel size and crops the output; deformkit needs no padding."""
    layer = randomise(compat.DeformConv2d(4, 6, 3, padding=1, deform_groups=2))
    x, offset = torch.randn(2, 4, *size).double(), torch.randn(2, 36, *size).double() * 2

    def theirs(x: Tensor, offset: Tensor) -> Tensor:
        more_h, more_w = (max(3 - n, 0) for n in size)
        padded = [F.pad(t, (0, more_w, 0, more_h)) for t in (x, offset)]
        output = published.modulated_conv(padded[0], padded[1], None, layer.weight, None, (1, 1), (1, 1), (1, 1), 1, 2)
        return output[:, :, : output.shape[2] - more_h, : output.shape[3] - more_w]

    results = [evaluate(function, (x, offset), (0, 1), torch.float64) for function in (layer, theirs)]
    for name, *pair in zip(("output", "x", "offset"), *results, strict=True):
        assert_close(*pair, name=name)


@packs
def test_packed_layers(pack: str) -> None:
    """The first two thirds of the output of ``conv_offset`` are offsets; the last third are the logits of the mask."""
    modulated = pack == "DCNv2"
    layer = randomise(PACKS[pack](8, 6, (3, 2), (1, 2), (2, 1), (2, 1), 2, 2))
    x = torch.randn(2, 8, 7, 8).double()
    predicted = F.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, (1, 2), (2, 1), (2, 1))
    assert predicted.shape[1] == (36 if modulated else 24)
    offset, mask = predicted[:, :24], predicted[:, 24:].sigmoid() if modulated else None
    steps = ((1, 2), (2, 1), (2, 1), 2, 2)
    assert hasattr(layer, "bias") == modulated
    bias = layer.bias if modulated else None
    expected = published.modulated_conv(x, offset, mask, layer.weight, bias, *steps)
    assert_close(layer(x), expected.detach())
    names = {"weight", "conv_offset.weight", "conv_offset.bias", *(["bias"] if modulated else [])}
    assert set(layer.state_dict()) == names


def test_layers_with_offsets_given() -> None:
    x, offset, mask = torch.randn(2, 8, 5, 6), torch.randn(2, 36, 5, 6), torch.rand(2, 18, 5, 6)
    first = compat.DeformConv2d(8, 4, 3, padding=1, groups=4, deform_groups=2)
    assert_equal(first(x, offset), dk.deform_conv2d(x, offset, first.weight, padding=1))
    second = compat.ModulatedDeformConv2d(8, 4, 3, padding=1, deform_groups=2)
    assert_equal(second(x, offset, mask), dk.deform_conv2d(x, offset, second.weight, second.bias, padding=1, mask=mask))
    assert set(first.state_dict()) == {"weight"} and set(second.state_dict()) == {"weight", "bias"}
    assert first.sampling_locations(offset).shape == (2, 2, 9, 5, 6, 2)


@packs
def test_a_new_layer_is_as_mmcv_leaves_it(pack: str) -> None:
    """Head and bias start at zero, the weights come from the same random numbers, and the mask is 1/2."""
    torch.manual_seed(3)
    layer = PACKS[pack](8, 6, 3, padding=1)
    torch.manual_seed(3)
    weight = torch.empty(6, 8, 3, 3)
    if pack == "DCN":
        nn.init.kaiming_uniform_(weight, nonlinearity="relu")
    else:
        weight.uniform_(-(72**-0.5), 72**-0.5)
        nn.Conv2d(8, 27, 3)
        weight.uniform_(-(72**-0.5), 72**-0.5)
        assert not layer.bias.any()
    assert_equal(layer.weight.detach(), weight)
    assert not any(parameter.any() for parameter in layer.conv_offset.parameters())
    x = torch.randn(1, 8, 5, 5)
    plain = F.conv2d(x.double(), weight.double(), padding=1)
    assert_close(layer(x).detach(), plain / (2 if pack == "DCNv2" else 1))


@packs
def test_old_state_dicts(pack: str) -> None:
    """Before version 2, the head of ``conv2`` was called ``conv2_offset``."""
    network = nn.ModuleDict({"block": nn.ModuleDict({"conv2": randomise(PACKS[pack](4, 6, 3))})})
    state = network.state_dict()
    old = {name.replace("conv2.conv_offset", "conv2_offset"): value for name, value in state.items()}
    assert "block.conv2_offset.weight" in old

    def load_whole(module: nn.Module, given: dict[str, Tensor], prefix: str = "") -> list[str]:
        """mmengine loads like this: every layer gets the whole state-dict."""
        missing: list[str] = []
        module._load_from_state_dict(given, prefix, {}, True, missing, [], [])
        for name, child in module.named_children():
            missing += load_whole(child, given, f"{prefix}{name}.")
        return missing

    for load in (lambda m: load_whole(m, dict(old)), lambda m: m.load_state_dict(convert.rename_offset_heads(old))):
        other = nn.ModuleDict({"block": nn.ModuleDict({"conv2": PACKS[pack](4, 6, 3).double()})})
        result = load(other)
        assert not (result if isinstance(result, list) else [*result.missing_keys, *result.unexpected_keys])
        for name, value in other.state_dict().items():
            assert_equal(value, state[name], name)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_dtype_is_that_of_the_offsets(half: torch.dtype) -> None:
    x, offset, weight = torch.randn(1, 4, 5, 5), torch.randn(1, 18, 5, 5).to(half), torch.randn(4, 4, 3, 3)
    mask, bias = torch.rand(1, 9, 5, 5), torch.randn(4)
    output = compat.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1)
    assert_equal(output, dk.deform_conv2d(*(t.to(half) for t in (x, offset, weight, bias)), 1, 1, 1, mask.to(half)))
    assert compat.deform_conv2d(x.to(half), offset.float(), weight.to(half), 1, 1).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_changes_no_dtype(half: torch.dtype) -> None:
    """The functions of mmcv compute in the dtype of their offsets, value or input."""
    x, offset, weight = torch.randn(1, 4, 5, 5), torch.randn(1, 18, 5, 5), torch.randn(4, 4, 3, 3)
    mask, rois = torch.rand(1, 9, 5, 5), torch.tensor([[0, 1.0, 2.0, 4.0, 4.0]])
    value, locations, weights = torch.randn(1, 47, 2, 3), torch.rand(1, 4, 2, 2, 3, 2), torch.rand(1, 4, 2, 2, 3)
    calls = [
        lambda: compat.deform_conv2d(x, offset, weight, 1, 1),
        lambda: compat.modulated_deform_conv2d(x.to(half), offset, mask, weight, None, 1, 1),
        lambda: compat.MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, locations, weights.to(half), 64),
        lambda: compat.multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights),
        lambda: compat.deform_roi_pool(x, rois, None, (2, 2)),
        lambda: compat.DeformRoIPool((2, 2))(x, rois),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", half):
            assert_equal(call(), expected)
        assert expected.dtype == torch.float32
    with torch.autocast("cpu", half):
        layer = compat.ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        assert layer(x).dtype == half, "that of its offsets, which a plain convolution makes"
        assert (
            compat.MultiScaleDeformableAttnFunction.apply(value.to(half), SHAPES, STARTS, locations, weights).dtype
            == half
        )


def test_a_layer_without_bias_has_no_attribute_of_that_name() -> None:
    layer = compat.DeformConv2d(4, 6, 3, stride=2, deform_groups=2)
    for one in (layer, copy.deepcopy(layer), compat.DeformConv2dPack(4, 6, 3)):
        assert not hasattr(one, "bias")
    assert repr(layer) == (
        "DeformConv2d(in_channels=4, out_channels=6, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0), "
        "dilation=(1, 1), groups=1, deform_groups=2)"
    )
    assert hasattr(compat.ModulatedDeformConv2d(4, 6, 3, bias=False), "bias")


def test_errors_of_convolution() -> None:
    x, offset, weight = torch.zeros(1, 8, 5, 5), torch.zeros(1, 36, 3, 3), torch.zeros(4, 4, 3, 3)
    with pytest.raises(ValueError, match=r"groups is 1; input has 8 channels and weight 4 .* it must be 2"):
        compat.deform_conv2d(x, offset, weight, deform_groups=2)
    with pytest.raises(ValueError, match=r"deform_groups is 1; offset has 36 channels, .* it must be 2"):
        compat.deform_conv2d(x, offset, weight, groups=2)
    with pytest.raises(
        ValueError, match=r"groups is 1; input has 8 channels and weight 3 .*, of which it is no multiple"
    ):
        compat.deform_conv2d(x, offset, weight[:, :3])
    with pytest.raises(ValueError, match="a 3x3 kernel needs 18 for each group, of which it is no multiple"):
        compat.deform_conv2d(x, offset[:, :9], weight, groups=2)
    with pytest.raises(ValueError, match="bias is True"):
        compat.deform_conv2d(x, offset, weight, 1, 0, 1, 2, 2, True)
    for options, message in (({"bias": True}, "bias is True"), ({"groups": 3}, "groups")):
        with pytest.raises(ValueError, match=message) as error:
            compat.DeformConv2d(8, 4, 3, **options)
        assert isinstance(error.value, AssertionError)
    with pytest.raises(ValueError, match=r"input has shape \[8, 5, 5\]; it must have 4 axes"):
        compat.deform_conv2d(x[0], offset, weight)
    with pytest.raises(ValueError, match="mask has 9 channels"):
        compat.modulated_deform_conv2d(x, offset, torch.zeros(1, 9, 3, 3), weight, groups=2, deform_groups=2)
    for layer in (compat.DeformConv2d, compat.ModulatedDeformConv2d):
        with pytest.raises(TypeError, match="padding is 'same'; it must be an int"):
            layer(8, 4, 3, padding="same")
    with pytest.raises(TypeError, match="mask is a NoneType"):
        compat.modulated_deform_conv2d(x, offset, None, weight, groups=2, deform_groups=2)


def published_roi_pool(named: dict[str, Any], input: Tensor, offset: Tensor | None) -> Tensor:
    """The formula of mmcv: regions are shifted by half a pixel; channel 0 of the offsets is x, channel 1 is y."""
    (rows, columns), scale, gamma = named["output_size"], named["spatial_scale"], named["gamma"]
    height, width = input.shape[2:]
    bins = []
    for r, (image, *corners) in enumerate(named["rois"].tolist()):
        x1, y1, x2, y2 = (corner * scale - 0.5 for corner in corners)
        bin_h, bin_w = (y2 - y1) / rows, (x2 - x1) / columns
        samples_h, samples_w = (named["sampling_ratio"] or ceil(size) for size in (bin_h, bin_w))
        for row in range(rows):
            for column in range(columns):
                shift_x, shift_y = offset[r, :, row, column] if offset is not None else torch.zeros(2).double()
                i, j = torch.arange(samples_h).double(), torch.arange(samples_w).double()
                y = y1 + row * bin_h + gamma * (y2 - y1) * shift_y + (i + 0.5) * bin_h / samples_h
                x = x1 + column * bin_w + gamma * (x2 - x1) * shift_x + (j + 0.5) * bin_w / samples_w
                y, x = torch.meshgrid(y, x, indexing="ij")
                inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
                values = published.bilinear(
                    input[int(image)][None], y.clamp(0, height - 1)[None], x.clamp(0, width - 1)[None]
                )
                bins.append((values * inside).sum((0, 2, 3)) / max(samples_h * samples_w, 1))
    return torch.stack(bins).unflatten(0, (len(named["rois"]), rows, columns)).movedim(-1, 1)


@pytest.mark.parametrize("case", ROI_CASES, ids=lambda c: c.name)
def test_roi_pooling(case: Any) -> None:
    named = case.arguments(torch.float64)
    tensors = [named["input"], named["offset"]]
    positions = [i for i, tensor in enumerate(tensors) if tensor is not None]
    numbers = (named["output_size"], named["spatial_scale"], named["sampling_ratio"], named["gamma"])
    results = [
        evaluate(function, tensors, positions, torch.float64)
        for function in (
            lambda input, offset: compat.deform_roi_pool(input, named["rois"], offset, *numbers),
            lambda input, offset: published_roi_pool(named, input, offset),
        )
    ]
    for name, *pair in zip(["output", *(("input", "offset")[i] for i in positions)], *results, strict=True):
        assert_close(*pair, name=name)
    layer = compat.DeformRoIPool(*numbers)
    assert_equal(layer(named["input"], named["rois"], named["offset"]), results[0][0])


@pytest.mark.parametrize("modulated", [False, True], ids=["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
def test_packed_roi_pooling(modulated: bool) -> None:
    kind = compat.ModulatedDeformRoIPoolPack if modulated else compat.DeformRoIPoolPack
    layer = randomise(kind((2, 3), 4, 10, 0.5, 2, 0.2))
    heads = {f"offset_fc.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    heads |= {f"mask_fc.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")} if modulated else set()
    assert set(layer.state_dict()) == heads
    input, rois = torch.randn(2, 4, 6, 8).double(), torch.tensor([[0, 1, 2, 9, 11], [1, 3, 0, 15, 9]]).double()
    named = {"rois": rois, "output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}
    plain = published_roi_pool(named, input, None).flatten(1)
    offset = layer.offset_fc(plain).reshape(2, 2, 2, 3)
    expected = published_roi_pool(named, input, offset)
    if modulated:
        expected = expected * layer.mask_fc(plain).reshape(2, 1, 2, 3)
    assert_close(layer(input, rois), expected.detach())
    assert isinstance(layer, compat.DeformRoIPool)


def test_half_rois_are_read_as_float32() -> None:
    input, rois = torch.randn(1, 3, 8, 8).half(), torch.tensor([[0, 1, 2, 7, 7]]).half()
    output = compat.deform_roi_pool(input, rois, None, (2, 2))
    assert_equal(output, dk.deform_roi_pool(input, rois.float(), output_size=(2, 2)))
    assert_equal(output, compat.DeformRoIPool((2, 2))(input, rois))


def core(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The function of transformers."""
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    return modeling.MultiScaleDeformableAttention()(value, shapes, shapes.tolist(), None, locations, weights, 64)


@pytest.mark.parametrize("seed", range(6))
def test_attention(seed: int) -> None:
    case = drawn.attention(seed)
    named, form = case.arguments(torch.float64, seed=seed), (len(case.sizes), case.points[0])
    shapes = torch.tensor(case.sizes)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)[:-1]])
    given = [
        named["value"],
        named["sampling_locations"].unflatten(3, form),
        named["attention_weights"].unflatten(3, form),
    ]
    expected = evaluate(lambda v, p, w: core(v, shapes, p, w), given, (0, 1, 2), torch.float64)
    for function in (
        lambda v, p, w: compat.MultiScaleDeformableAttnFunction.apply(v, shapes, starts, p, w, 64),
        lambda v, p, w: compat.multi_scale_deformable_attn_pytorch(v, shapes, p, w),
    ):
        for pair in zip(evaluate(function, given, (0, 1, 2), torch.float64), expected, strict=True):
            assert_close(*pair)


SHAPES = torch.tensor([[5, 7], [3, 4]])
STARTS = torch.tensor([0, 35])


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["queries-first", "batch-first"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_attention_layer(coordinates: int, batch_first: bool, ratio: float) -> None:
    """The formula of mmcv around the function: positions, projections, padding, dropout and the residual connection."""
    layer = randomise(
        compat.MultiScaleDeformableAttention(12, 3, 2, 2, batch_first=batch_first, value_proj_ratio=ratio)
    )
    layer.eval()
    query, position, identity = (torch.randn(2, 6, 12).double() for _ in range(3))
    value, padding = torch.randn(2, 47, 12).double(), torch.rand(2, 47) < 0.3
    reference = torch.rand(2, 6, 2, coordinates).double()

    asked = query + position
    projected = F.linear(value, layer.value_proj.weight, layer.value_proj.bias)
    assert projected.shape[-1] == 12 * ratio
    projected = projected.masked_fill(padding[..., None], 0.0).reshape(2, 47, 3, -1)
    offsets = layer.sampling_offsets(asked).reshape(2, 6, 3, 2, 2, 2)
    weights = layer.attention_weights(asked).reshape(2, 6, 3, 4).softmax(-1).reshape(2, 6, 3, 2, 2)
    if coordinates == 2:
        locations = reference[:, :, None, :, None] + offsets / SHAPES.flip(1)[:, None]
    else:
        locations = reference[:, :, None, :, None, :2] + offsets / 2 * reference[:, :, None, :, None, 2:] / 2
    expected = layer.output_proj(core(projected, SHAPES, locations, weights)) + identity

    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    output = layer(
        turn(query),
        None,
        turn(value),
        turn(identity),
        query_pos=turn(position),
        key_padding_mask=padding,
        reference_points=reference,
        spatial_shapes=SHAPES,
        level_start_index=STARTS,
        key_pos=None,
    )
    assert_close(output, turn(expected).detach())
    where = {"reference_points": reference, "spatial_shapes": SHAPES, "query_pos": turn(position)}
    where |= {"key_padding_mask": padding, "residual": turn(identity)}
    assert_equal(layer(turn(query), value=turn(value), **where), output, "by the older name of identity")


def test_the_attention_layer_by_default() -> None:
    """The query serves as value and identity; dropout acts on the term that is added to it."""
    layer = compat.MultiScaleDeformableAttention(8, 2, 1, dropout=1.0)
    query, where = torch.randn(35, 2, 8), {"reference_points": torch.rand(2, 35, 1, 2), "spatial_shapes": SHAPES[:1]}
    assert_equal(layer(query, **where), query)
    layer.eval()
    same = dk.nn.MSDeformAttn(8, 1, 2)
    same.load_state_dict(layer.state_dict())
    swapped = query.transpose(0, 1)
    alone = same(swapped, where["reference_points"], swapped, SHAPES[:1])
    assert_equal(layer(query, **where), alone.transpose(0, 1) + query)


def test_errors_of_the_attention_layer() -> None:
    with pytest.raises(ValueError, match="init_cfg is"):
        compat.MultiScaleDeformableAttention(8, 2, init_cfg={"type": "Xavier"})
    with pytest.raises(ValueError, match=r"value_proj_ratio is 0.5, which makes the values 3 wide"):
        compat.MultiScaleDeformableAttention(6, 2, value_proj_ratio=0.5)
    layer = compat.MultiScaleDeformableAttention(8, 2, 2)
    with pytest.raises(ValueError, match="level_start_index is"):
        layer(
            torch.zeros(47, 1, 8),
            reference_points=torch.rand(1, 47, 2, 2),
            spatial_shapes=SHAPES,
            level_start_index=torch.tensor([0, 1]),
        )
