"""The layers of deformable RoI pooling."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

SIZE = (9, 8, 7)
BINS = (3, 2, 2)


def tensors(axes: int, dtype: torch.dtype = torch.float32, rois: int = 5) -> tuple[Tensor, Tensor]:
    """Input and RoIs, in units of half a pixel."""
    low, extent = torch.rand(rois, axes) * 8, torch.rand(rois, axes) * 8 + 2
    boxes = torch.cat([torch.arange(rois).unsqueeze(1) % 2, low, low + extent], 1)
    return torch.randn(2, 4, *SIZE[:axes]).to(dtype), boxes.to(torch.float64 if dtype == torch.float64 else boxes.dtype)


def given(axes: int, **options: Any) -> dk.nn.DeformRoIPool:
    return dk.nn.DeformRoIPool(BINS[:axes], 0.5, spatial_dims=axes, **options)


def packed(axes: int, **options: Any) -> dk.nn.PackedDeformRoIPool:
    return dk.nn.PackedDeformRoIPool(BINS[:axes], 4, 16, 0.5, spatial_dims=axes, **options)


def jitter(layer: nn.Module) -> None:
    """Give the last fully connected layers weights, so that they predict something."""
    for name in ("offset_fc.4", "mask_fc.2")[: 1 + layer.modulated]:
        for parameter in layer.get_submodule(name).parameters():
            nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("ratio", [0, 2])
def test_the_given_layer_is_the_function(axes: int, ratio: int) -> None:
    input, rois = tensors(axes)
    offset = torch.randn(5, axes, *BINS[:axes])
    layer = given(axes, sampling_ratio=ratio, gamma=0.3)
    options = {"output_size": BINS[:axes], "spatial_scale": 0.5, "sampling_ratio": ratio, "gamma": 0.3}
    assert_equal(layer(input, rois, offset), dk.deform_roi_pool(input, rois, offset, **options))
    assert_equal(layer(input, rois), dk.deform_roi_pool(input, rois, **options))
    assert not list(layer.parameters()) and not layer.state_dict()


def test_arguments_have_their_places() -> None:
    layer = dk.nn.DeformRoIPool(7, 0.25, 2, 0.2)
    assert (layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.gamma) == ((7, 7), 0.25, 2, 0.2)
    own = dk.nn.PackedDeformRoIPool((3, 2), 4, 16, 0.25, 2, 0.2)
    assert (own.output_size, own.output_channels, own.deform_fc_channels) == ((3, 2), 4, 16)
    assert (own.spatial_scale, own.sampling_ratio, own.gamma, own.modulated) == (0.25, 2, 0.2, False)
    assert dk.nn.PackedDeformRoIPool(1, 1).deform_fc_channels == 1024
    plain = dk.nn.DeformRoIPool(7)
    assert (plain.spatial_scale, plain.sampling_ratio, plain.gamma, plain.spatial_dims) == (1.0, 0, 0.1, 2)


@pytest.mark.parametrize("modulated", [False, True])
def test_a_new_packed_layer_pools_plainly(axes: int, modulated: bool) -> None:
    input, rois = tensors(axes)
    plain = given(axes)(input, rois)
    assert_close(packed(axes, modulated=modulated)(input, rois), plain.double() * (0.5 if modulated else 1))


def test_names_of_parameters_are_those_of_mmcv() -> None:
    layer = dk.nn.PackedDeformRoIPool((3, 2), 4, 16, modulated=True)
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "offset_fc.0.weight": [16, 24],
        "offset_fc.0.bias": [16],
        "offset_fc.2.weight": [16, 16],
        "offset_fc.2.bias": [16],
        "offset_fc.4.weight": [12, 16],
        "offset_fc.4.bias": [12],
        "mask_fc.0.weight": [16, 24],
        "mask_fc.0.bias": [16],
        "mask_fc.2.weight": [6, 16],
        "mask_fc.2.bias": [6],
    }
    assert list(dk.nn.PackedDeformRoIPool((3, 2), 4, 16).state_dict()) == list(shapes)[:6]


def test_packed_is_the_given_layer_at_its_prediction(axes: int) -> None:
    layer = packed(axes, modulated=True, sampling_ratio=2)
    jitter(layer)
    input, rois = tensors(axes)
    offset, mask = layer.predict(input, rois)
    assert offset.shape == (5, axes, *BINS[:axes]) and offset.std() > 0
    assert mask is not None and mask.shape == (5, 1, *BINS[:axes])
    assert mask.min() > 0 and mask.max() < 1 and mask.std() > 0
    assert_equal(layer(input, rois), given(axes, sampling_ratio=2)(input, rois, offset) * mask)
    assert packed(axes).predict(input, rois)[1] is None


def test_the_first_rows_of_the_head_are_x(axes: int) -> None:
    """As in mmcv, a head that predicts 1 in its first rows moves the bins along the last axis of the input."""
    layer = packed(axes, sampling_ratio=2, gamma=0.25)
    bins = layer.offset_fc[4].bias.numel() // axes
    nn.init.ones_(layer.offset_fc[4].bias.data[:bins])
    ramp = torch.arange(30.0).expand(1, 4, *[30] * axes)
    rois = torch.tensor([[0.0, *[20.0] * axes, *[28.0] * axes]])  # 4 pixels long
    assert_close(layer(ramp, rois), given(axes)(ramp, rois).double() + 0.25 * 4)


@pytest.mark.parametrize("ratio", [0, 2])
def test_the_heads_learn(axes: int, ratio: int) -> None:
    layer = packed(axes, modulated=True, sampling_ratio=ratio)
    input, rois = tensors(axes)
    losses = []
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        loss = (layer(input, rois) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert losses[-1] < losses[0]
    for last in (layer.offset_fc[4], layer.mask_fc[2]):
        assert (last.weight.abs().sum(1) > 0).all(), "every offset and every mask is learnt"


def test_no_rois(axes: int) -> None:
    layer = packed(axes, modulated=True)
    input, rois = tensors(axes)
    output = layer(input.requires_grad_(), rois[:0])
    assert output.shape == (0, 4, *BINS[:axes])
    output.sum().backward()
    assert input.grad is not None and not input.grad.any()


def test_copies(axes: int) -> None:
    layer = packed(axes, modulated=True, sampling_ratio=2, gamma=0.2)
    jitter(layer)
    arguments = tensors(axes)
    expected = layer(*arguments)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    restored = packed(axes, modulated=True, sampling_ratio=2, gamma=0.2)
    restored.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        assert_equal(other(*arguments), expected)
        assert repr(other) == repr(layer)


def test_repr() -> None:
    assert repr(dk.nn.DeformRoIPool(7)) == (
        "DeformRoIPool(output_size=(7, 7), spatial_scale=1.0, sampling_ratio=0, gamma=0.1)"
    )
    text = repr(dk.nn.PackedDeformRoIPool(7, 8, 16, modulated=True, spatial_dims=1))
    for part in ("output_size=(7,)", "spatial_dims=1, output_channels=8, deform_fc_channels=16, modulated=True"):
        assert part in text
    assert "(offset_fc)" in text and "(mask_fc)" in text


def test_reset_parameters(axes: int) -> None:
    layer = packed(axes, modulated=True)
    jitter(layer)
    first = layer.offset_fc[0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.offset_fc[0].weight, first)
    for last in (layer.offset_fc[4], layer.mask_fc[2]):
        assert not any(parameter.any() for parameter in last.parameters())


def test_device_and_dtype(axes: int, dtype: torch.dtype) -> None:
    layer = packed(axes, modulated=True, device="meta", dtype=dtype)
    assert {p.device.type for p in layer.parameters()} == {"meta"} and {p.dtype for p in layer.parameters()} == {dtype}
    arguments = tensors(axes, dtype)
    assert layer(*(t.to("meta") for t in arguments)).shape == (5, 4, *BINS[:axes])
    with torch.device("meta"):
        assert packed(axes).offset_fc[4].weight.is_meta
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    jitter(real)
    output = real(*arguments)
    assert output.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(axes: int, half: torch.dtype) -> None:
    layer = packed(axes, modulated=True)
    jitter(layer)
    input, rois = tensors(axes)
    with torch.autocast("cpu", half):
        offset, mask = layer.predict(input, rois)
        output = layer(input, rois)
    assert output.dtype == half and mask is not None
    assert_equal(output, given(axes)(input.to(half), rois, offset) * mask)
    output.float().sum().backward()
    grad = layer.offset_fc[0].weight.grad
    assert grad is not None and grad.dtype == torch.float32 and grad.any()


@pytest.mark.parametrize(("ratio", "dynamic"), [(0, True), (2, False)])
def test_compile(axes: int, ratio: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = packed(axes, modulated=True, sampling_ratio=ratio)
    jitter(model)
    arguments = tensors(axes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = model(*arguments)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    output = compiled(*arguments)
    output.square().sum().backward()
    assert_close(output, expected.detach().double())
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        assert_close(parameter.grad, grad.double(), name=name)


def test_export(axes: int) -> None:
    model = packed(axes, modulated=True)
    jitter(model)
    count = torch.export.Dim("count", min=1, max=64)
    program = torch.export.export(model, tensors(axes), dynamic_shapes=({}, {0: count}))
    more = tensors(axes, rois=9)
    assert_close(program.module()(*more), model(*more).detach().double())


ERRORS = [
    ({"output_size": (3, 3, 3)}, ValueError, r"output_size is \(3, 3, 3\); it needs 2 values"),
    ({"output_size": 0}, ValueError, "output_size is 0; each value must be at least 1"),
    ({"output_size": 2.5}, TypeError, "output_size is 2.5; it must be an int"),
    ({"spatial_scale": 0}, ValueError, "spatial_scale is 0; it must be a finite number above 0"),
    ({"sampling_ratio": -1}, ValueError, "sampling_ratio is -1; it must be an int of at least 0"),
    ({"sampling_ratio": 1.5}, TypeError, "sampling_ratio is 1.5; it must be an int of at least 0"),
    ({"gamma": float("inf")}, ValueError, "gamma is inf; it must be a finite number"),
    ({"spatial_dims": 4}, ValueError, "spatial_dims is 4; it must be 1, 2 or 3"),
]
PACKED_ERRORS = [
    ({"output_channels": 0}, ValueError, "output_channels is 0; it must be at least 1"),
    ({"output_channels": 4.0}, TypeError, "output_channels is 4.0; it must be an int"),
    ({"deform_fc_channels": 0}, ValueError, "deform_fc_channels is 0; it must be at least 1"),
    ({"deform_fc_channels": None}, TypeError, "deform_fc_channels is None; it must be an int"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS + PACKED_ERRORS, ids=str)
def test_wrong_constructor(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dk.nn.PackedDeformRoIPool(**{"output_size": 3, "output_channels": 4, **wrong})
    if (wrong, error, message) in ERRORS:
        with pytest.raises(error, match=message):
            dk.nn.DeformRoIPool(**{"output_size": 3, **wrong})


def test_wrong_forward() -> None:
    input, rois = tensors(2)
    for layer in (given(2), packed(2)):
        with pytest.raises(ValueError, match=r"input has shape \[4, 9, 8\]; it must have 4 axes"):
            layer(input[0], rois)
        with pytest.raises(ValueError, match=r"input has shape \[2, 4, 9\]; it must have 4 axes"):
            layer(input[..., 0], rois)
        with pytest.raises(TypeError, match="input is a list; it must be a torch"):
            layer([input], rois)
        with pytest.raises(ValueError, match=r"rois has shape \[5, 4\]; with 2 spatial axes it must be \[R, 5\]"):
            layer(input, rois[:, 1:])
        with pytest.raises(ValueError, match=r"rois\[1, 0\] is 1; .* as input has batch size 1"):
            layer(input[:1], rois)
    with pytest.raises(ValueError, match="input has 3 channels; this layer has output_channels=4"):
        packed(2)(input[:, :3], rois)
    with pytest.raises(ValueError, match=r"offset has shape \[5, 2, 2, 3\]; it must be \[5, 2, 3, 2\]"):
        given(2)(input, rois, torch.zeros(5, 2, 2, 3))
