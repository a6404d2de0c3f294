"""The positions, weights and levels from ``viz.sampling`` are those that the layers sample."""

from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from patched import SHAPES, attention, ours
from torch import Tensor, nn

import deformkit as dk
from deformkit import viz
from deformkit.ops.sample.reference import sample


def read(field: Tensor, layer: viz.Layer, group: int) -> Tensor:
    """``field [B, C, *S]`` at the positions of one group of a layer with one level, ``[B, C, *out, P]``."""
    positions = layer.positions.select(-3, group).double()
    return sample(
        field.double(), torch.zeros(field.dim() - 2, dtype=torch.int64), positions, layer.boundary, layer.mode
    )


def convolved(layer: viz.Layer, input: Tensor, weight: Tensor) -> Tensor:
    """The convolution of its samples: they are multiplied by the mask and contracted with the weight."""
    groups = layer.positions.shape[-3]
    parts = input.chunk(groups, 1)
    columns = [read(part, layer, g) * layer.weights.select(-2, g).unsqueeze(1) for g, part in enumerate(parts)]
    return torch.einsum("bc...k,fck->bf...", torch.cat(columns, 1), weight.double().flatten(2))


def drawn(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.parametrize("boundary", ["zeros", "border"])
def test_samples_of_a_convolution_give_its_output(axes: int, boundary: Any) -> None:
    size = (9, 8, 7)[:axes]
    options: dict[str, Any] = {"modulated": True, "offset_groups": 2, "boundary": boundary, "bias": False}
    layer = drawn(getattr(dk.nn, f"PackedDeformConv{axes}d")(4, 6, 3, 2, 1, **options))
    input = torch.randn(2, 4, *size)
    (found,) = viz.sampling(layer, input)
    assert (found.name, found.kind, found.sizes, found.out) == (
        "",
        "deform_conv",
        (size,),
        tuple(layer(input).shape[2:]),
    )
    assert found.positions.std() > 0.3 and not torch.equal(found.weights, torch.ones_like(found.weights))
    torch.testing.assert_close(convolved(found, input, layer.weight), layer(input).double(), rtol=1e-4, atol=1e-4)
    offset, _ = layer.predict(input)
    expected = layer.sampling_locations(offset).movedim((1, 2), (-3, -2))
    torch.testing.assert_close(found.positions, expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_positions_are_in_pixels_of_the_input_before_padding(mode: Any) -> None:
    layer = drawn(dk.nn.PackedDeformConv2d(3, 4, (3, 5), padding="same", padding_mode=mode))
    input = torch.randn(1, 3, 7, 8)
    (found,) = viz.sampling(layer, input)
    offset, _ = layer.predict(input)
    torch.testing.assert_close(found.positions, layer.sampling_locations(offset).movedim((1, 2), (-3, -2)))
    assert found.sizes == ((7, 8),)


@pytest.mark.parametrize("name", ["DCNv3", "DCNv4"])
def test_samples_of_an_aggregation_give_its_output(axes: int, name: str) -> None:
    size = (7, 6, 5)[:axes]
    layer = drawn(getattr(dk.nn, name)(16, group=2, offset_scale=1.5, stride=2, spatial_dims=axes))
    values: list[Tensor] = []
    layer.output_proj.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    input = torch.randn(2, *size, 16)
    projection = layer.input_proj if name == "DCNv3" else layer.value_proj
    (found,) = viz.sampling(layer, input)
    field = projection(input).movedim(-1, 1).chunk(2, 1)
    heads = [(read(part, found, g) * found.weights.select(-2, g).unsqueeze(1)).sum(-1) for g, part in enumerate(field)]
    torch.testing.assert_close(torch.cat(heads, 1).movedim(1, -1), values[0].double(), rtol=1e-4, atol=1e-4)
    middle = found.anchors[(0, *[1] * axes)]
    torch.testing.assert_close(middle, torch.full((axes,), 2.0))


def attended(layer: viz.Layer, value: Tensor) -> Tensor:
    """Attention from its samples of ``value [B, S, H, D]``: ``[B, Q, H*D]``."""
    heads = []
    for head in range(value.shape[2]):
        total: Any = 0.0
        fields = value[:, :, head].split([prod(size) for size in layer.sizes], 1)
        for level, (size, field) in enumerate(zip(layer.sizes, fields, strict=True)):
            chosen = layer.levels == level
            points = layer.positions[:, :, head, chosen].double()
            field = field.transpose(1, 2).unflatten(-1, size).double()
            read = sample(field, torch.zeros(len(size), dtype=torch.int64), points, layer.boundary, layer.mode)
            total = total + (read * layer.weights[:, :, head, chosen].unsqueeze(1)).sum(-1)
        heads.append(total.transpose(1, 2))
    return torch.cat(heads, -1)


def test_samples_of_attention_give_its_output(axes: int) -> None:
    sizes = [(6, 5, 4)[:axes], (3, 3, 2)[:axes]]
    total = sum(map(prod, sizes))
    layer = drawn(dk.nn.MSDeformAttn(16, n_levels=2, n_heads=2, n_points=[3, 2], spatial_dims=axes))
    values: list[Tensor] = []
    layer.output_proj.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    features = torch.randn(2, total, 16)
    (found,) = viz.sampling(layer, features, torch.rand(2, total, 2, axes), features, sizes)
    assert found.levels.tolist() == [0, 0, 0, 1, 1] and found.sizes == tuple(sizes)
    value = layer.value_proj(features).unflatten(-1, (2, 8))
    torch.testing.assert_close(attended(found, value), values[0].double(), rtol=1e-4, atol=1e-4)
    # A query of self-attention stands for its own pixel; on the first level this is its index.
    first = torch.stack(torch.meshgrid(*map(torch.arange, sizes[0]), indexing="ij"), -1).flatten(0, -2).float()
    torch.testing.assert_close(found.anchors[0, : len(first)], first, atol=1e-5, rtol=0)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("model_type", ["deformable_detr", "mask2former", "rt_detr_v2", "d_fine"])
def test_layers_of_transformers_patched_or_not(model_type: str, patched: bool) -> None:
    layer, arguments = attention(model_type)
    if patched:
        dk.patch(layer)
    values: list[Tensor] = []
    projection = getattr(layer, "output_proj", None)
    if isinstance(projection, nn.Linear):
        projection.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    before = ours(lambda: layer(**arguments))
    (found,) = viz.sampling(layer, **arguments)
    assert ours(lambda: layer(**arguments)) == before, "the model is left as it was"
    hidden = arguments["encoder_hidden_states"]
    value = layer.value_proj(hidden) if hasattr(layer, "value_proj") else hidden
    expected = values[0] if values else layer(**arguments)[0]
    actual = attended(found, value.unflatten(-1, (2, 8)))
    assert found.sizes == tuple(SHAPES) and found.positions.shape[-3:] == (2, 6 if model_type != "d_fine" else 5, 2)
    torch.testing.assert_close(actual, expected.double(), rtol=1e-4, atol=1e-4)


def test_stand_ins_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    host = stand_ins.install(monkeypatch, "torchvision.ops.deform_conv", "torchvision.ops")
    layer = drawn(host.DeformConv2d(4, 6, 3, padding=1))
    input, offset = torch.randn(2, 4, 7, 8), torch.randn(2, 18, 7, 8)
    (found,) = viz.sampling(layer, input, offset)
    output = convolved(found, input, layer.weight) + layer.bias[:, None, None].double()
    with torch.no_grad():
        expected = dk.deform_conv2d(input, offset, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(output, expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_a_call_of_torchvisions_operator_that_patch_cannot_see(masked: bool) -> None:
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision defines its operator itself")

    def computed(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        window = ([rest[0], rest[1]], [rest[2], rest[3]], [rest[4], rest[5]])
        return dk.reference.deform_conv(input, offset, weight, bias, *window, mask if rest[-1] else None, "zeros")

    numbers = "stride_h stride_w pad_h pad_w dilation_h dilation_w groups offset_groups".split()
    tensors = ", ".join(f"Tensor {name}" for name in ("input", "weight", "offset", "mask", "bias"))
    schema = f"deform_conv2d({tensors}, {', '.join(f'int {name}' for name in numbers)}, bool use_mask) -> Tensor"
    input, weight, offset = torch.randn(1, 4, 7, 9), torch.randn(6, 4, 3, 2), torch.randn(1, 24, 4, 9)
    mask = torch.rand(1, 12, 4, 9) if masked else torch.zeros(1, 1)

    class Calls(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            steps = (2, 1, 1, 1, 1, 2, 1, 2, masked)
            return torch.ops.torchvision.deform_conv2d(input, weight, offset, mask, torch.zeros(6), *steps)

    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        library.define(schema)
        library.impl("deform_conv2d", computed, "CompositeExplicitAutograd")
        (found,) = viz.sampling(Calls(), input)
        expected = Calls()(input)
    torch.testing.assert_close(convolved(found, input, weight), expected.double(), rtol=1e-4, atol=1e-4)


def test_stand_ins_of_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mmcv.ops.modulated_deform_conv"
    host = stand_ins.install(monkeypatch, name)
    layer = drawn(host.ModulatedDeformConv2dPack(4, 6, 3, padding=1))
    input = torch.randn(2, 4, 7, 8)
    (found,) = viz.sampling(layer, input)
    actual = convolved(found, input, layer.weight)
    if layer.bias is not None:
        actual = actual + layer.bias[:, None, None].double()
    torch.testing.assert_close(actual, layer(input).double(), rtol=1e-4, atol=1e-4)
    assert found.weights.max() < 1


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_samples_of_pooling_average_to_its_output(axes: int, sampling_ratio: int) -> None:
    size = (9, 8, 7)[:axes]
    layer = dk.nn.DeformRoIPool(2, sampling_ratio=sampling_ratio, spatial_dims=axes)
    input = torch.randn(2, 3, *size)
    rois = torch.tensor([[1.0, *[1.0] * axes, *[5.0] * axes], [0.0, *[2.0] * axes, *[4.5] * axes]])
    offset = torch.rand(2, axes, *[2] * axes)
    (found,) = viz.sampling(layer, input, rois, offset)
    assert found.images.tolist() == [1, 0]
    points, weights = found.positions.squeeze(-3), found.weights.squeeze(-2)
    read = sample(input[found.images].double(), torch.zeros(axes, dtype=torch.int64), points.double(), "border")
    actual = (read.nan_to_num(0.0) * weights.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(actual, layer(input, rois, offset).double(), rtol=1e-4, atol=1e-4)


def test_layers_have_their_names_and_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(dk.nn.PackedDeformConv2d(1, 2, 3), nn.ReLU(), dk.nn.PackedDeformConv2d(2, 3, 3))
    found = viz.sampling(model, torch.randn(1, 1, 9, 9))
    assert [layer.name for layer in found] == ["0", "2"] and found["2"] is found[-1]
    assert str(found) == "\n".join(
        [
            "0: deform_conv, 7x7 positions x 1 x 9 samples of 9x9",
            "2: deform_conv, 5x5 positions x 1 x 9 samples of 7x7",
        ]
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        viz.sampling(model, torch.randn(1, 1, 1, 1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_receptive_field_through_stacked_layers() -> None:
    model = nn.Sequential(*(dk.nn.PackedDeformConv2d(1, 1, 3, padding=1) for _ in range(2)))
    model[1].offset_head.bias.data[0::2] = 3.0
    found = viz.sampling(model, torch.randn(1, 1, 15, 15))
    field = found.receptive_field(at=(5, 7))
    rows, columns = field.nonzero().T
    # Two 3x3 layers reach 2 pixels around; the second one samples 3 rows farther down.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 10, 5, 9)


def test_receptive_field_of_a_layer_with_channels_last(axes: int) -> None:
    size = (7, 8, 9)[:axes]
    layer = drawn(dk.nn.DCNv4(4, group=1, spatial_dims=axes))
    nn.init.zeros_(layer.offset_mask.weight)
    nn.init.ones_(layer.offset_mask.bias)
    field = viz.sampling(layer, torch.randn(1, *size, 4)).receptive_field(at=(2,) * axes)
    assert field.shape == size
    # All offsets are 1: the window is around the next position.
    reached = field.nonzero()
    assert reached.amin(0).tolist() == [2] * axes and reached.amax(0).tolist() == [4] * axes


def test_a_compiled_model_and_half_precision(tmp_path: Path) -> None:
    model = nn.Sequential(drawn(dk.nn.PackedDeformConv2d(1, 2, 3))).bfloat16()
    input = torch.randn(1, 1, 7, 7, dtype=torch.bfloat16)
    found, eager = viz.sampling(torch.compile(model), input), viz.sampling(model, input)
    assert found[0].positions.dtype == torch.float32 and found[0].name == "_orig_mod.0"
    assert torch.equal(found[0].positions, eager[0].positions)
    assert eager.receptive_field().dtype == torch.float32
    assert torch.equal(found.receptive_field(), eager.receptive_field())
    pytest.importorskip("matplotlib")
    eager.plot("receptive_field").savefig(tmp_path / "field.png")


def test_a_model_without_deformable_layers() -> None:
    found = viz.sampling(nn.Linear(2, 2), torch.randn(1, 2))
    assert len(found) == 0
    pytest.importorskip("plotly")
    with pytest.raises(IndexError, match="the model has no deformable layer"):
        found.html("page.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": (1, 99)}, r"at is \(1, 99\); layer '' has output positions 0..4 x 0..4"),
        ({"row": 3}, "row is 3; layer '' has 1 rows"),
        ({"what": "nothing"}, "what is 'nothing'"),
        ({"image": torch.zeros(3)}, r"image has shape \[3\]; it must have 2 axes, or 3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("matplotlib")
    found = viz.sampling(dk.nn.PackedDeformConv2d(1, 2, 3), torch.randn(1, 1, 7, 7))
    with pytest.raises(ValueError, match=message):
        found.plot(**arguments)


@pytest.mark.parametrize("package", ["matplotlib", "plotly"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deformkit.viz._sampling.find_spec", lambda name: None)
    found = viz.sampling(dk.nn.PackedDeformConv2d(1, 2, 3), torch.randn(1, 1, 7, 7))
    with pytest.raises(ImportError, match=rf"deformkit\.viz needs {package}; pip install 'deformkit\[viz\]'"):
        found.plot() if package == "matplotlib" else found.html("page.html")


def test_reference_points_are_not_taken_for_the_image() -> None:
    pytest.importorskip("matplotlib")
    layer = dk.nn.MSDeformAttn(16, n_levels=2, n_heads=2, n_points=2)
    features = torch.randn(1, 60, 16)
    found = viz.sampling(layer, features, torch.rand(1, 60, 2, 2), features, [(6, 8), (3, 4)])
    (axis,) = found.plot().axes
    assert axis.get_xlim() == (-0.5, 7.5) and axis.get_ylim() == (5.5, -0.5) and not axis.images
    with pytest.raises(ValueError, match="the model has no floating-point input with 2 spatial axes"):
        found.receptive_field()
