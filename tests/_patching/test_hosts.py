"""Patching other hosts: the hosts themselves if they are installed, and stand-ins with their names and formulas."""

import copy
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import stand_ins
import torch
from patched import SHAPES, doubled, ours
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

# Other hosts, if they are installed


def test_model_of_ultralytics() -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model, pixels = tasks.RTDETRDetectionModel("rtdetr-l.yaml", verbose=False), torch.randn(1, 3, 128, 128)
    assert_same_in_float64(model, pixels, lambda output: [output[0]])


@pytest.mark.filterwarnings("ignore:RFDETRNanoConfig was instantiated")
def test_model_of_rfdetr() -> None:
    rfdetr = pytest.importorskip("rfdetr")
    model, pixels = rfdetr.RFDETRNano(pretrain_weights=None).model.model, torch.randn(1, 3, 384, 384)
    assert_same_in_float64(model, pixels, lambda output: [output["pred_logits"], output["pred_boxes"]])


def assert_same_in_float64(model: nn.Module, pixels: Tensor, outputs: Callable[[Any], list[Tensor]]) -> None:
    model, pixels = model.double().eval(), pixels.double()
    with torch.no_grad():
        expected = outputs(model(pixels))
        done = dk.patch(model)
        actual = outputs(model(pixels))
    assert ours(lambda: model(pixels))["ms_deform_attn"] == max(part.count for part in done.replaced)
    dk.unpatch(model)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Stand-ins with the names and formulas of other hosts


def attention_arguments(merged: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights with two levels and three points each."""
    weights = torch.rand(2, 7, 2, 2, 3)
    locations = torch.rand(2, 7, 2, 2, 3, 2) * 1.4 - 0.2
    if merged:
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    return torch.randn(2, 42, 2, 4), locations, weights


def check(model: nn.Module, inputs: tuple[Any, ...], host: ModuleType, operator: str) -> dk._patching.Patch:
    """A patched model gives the result of the host without calling it, and is restored."""
    original = copy.deepcopy(model)
    with torch.no_grad():
        reference, truth = model(*inputs), copy.deepcopy(model).double()(*doubled(inputs))
        done = dk.patch(model)
        host.calls.clear()
        actual = model(*inputs)
    assert not host.calls
    assert ours(lambda: model(*inputs))[operator] > 0
    assert_close(actual, truth, reference)
    if all(part.shared is None for part in done.replaced):
        assert not ours(lambda: original(*inputs)), "another instance is as it was"
        report = dk.verify(original, model, inputs)
        assert report.ok, report
        assert_equal(pickle.loads(pickle.dumps(model))(*inputs), actual)
    dk.unpatch(done)
    assert_equal(model(*inputs), reference)
    assert host.calls
    return done


def test_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, "torchvision.ops.deform_conv", "torchvision.ops")
    host = sys.modules["torchvision.ops.deform_conv"]
    layer = host.DeformConv2d(4, 6, 3, padding=1)
    inputs = (torch.randn(2, 4, 9, 8), torch.randn(2, 18, 9, 8), torch.rand(2, 9, 9, 8))
    done = check(layer, inputs, host, "deform_conv")
    assert str(done.replaced[0]) == (
        "1 x torchvision.ops.deform_conv.DeformConv2d by deformkit.deform_conv2d, in this model alone"
    )


def test_torchvision_function_by_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, "torchvision.ops.deform_conv", "torchvision.ops")
    host = sys.modules["torchvision.ops.deform_conv"]
    places = {
        "from torchvision.ops import deform_conv2d": ("deform_conv2d", "user.deform_conv2d"),
        "import torchvision": ("torchvision.ops.deform_conv2d", "torchvision.ops.deform_conv2d"),
        "import torchvision.ops as ops": ("ops.deform_conv.deform_conv2d", "torchvision.ops.deform_conv.deform_conv2d"),
    }
    for line, (name, place) in places.items():
        user = ModuleType("user")
        monkeypatch.setitem(sys.modules, "user", user)
        exec(
            f"{line}\nfrom torch import nn\nclass User(nn.Module):\n"
            "    def forward(self, x, offset, weight):\n"
            f"        return (lambda: {name}(x, offset, weight))()",
            vars(user),
        )
        inputs = (torch.randn(1, 2, 5, 6), torch.randn(1, 18, 3, 4), torch.randn(3, 2, 3, 3))
        done = check(user.User(), inputs, host, "deform_conv")
        assert [part.shared for part in done.replaced] == [place]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchvision_in_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched layer, and a network whose file had the function replaced by name."""
    stand_ins.install(monkeypatch, "torchvision.ops.deform_conv", "torchvision.ops")
    host = sys.modules["torchvision.ops.deform_conv"]
    inputs = (torch.randn(2, 4, 9, 8), torch.randn(2, 18, 9, 8), torch.rand(2, 9, 9, 8))
    layer = host.DeformConv2d(4, 6, 3, padding=1)
    dk.patch(layer)
    expected = layer(*inputs)
    for compiled in (torch.jit.script(layer), torch.jit.trace(layer, inputs)):
        assert_equal(compiled(*inputs), expected)
    dk.unpatch(layer)


def test_subclass_with_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, "torchvision.ops.deform_conv", "torchvision.ops")
    host = sys.modules["torchvision.ops.deform_conv"]

    class Packed(host.DeformConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input, input.new_full((1, 18, 4, 4), 0.3))

    done = check(Packed(2, 3, 3), (torch.randn(1, 2, 6, 6),), host, "deform_conv")
    assert [part.shared for part in done.replaced] == ["torchvision.ops.deform_conv.deform_conv2d"]


@pytest.mark.parametrize("size", [(9, 8), (2, 8)], ids=["", "smaller than the kernel"])
def test_mmcv_deform_conv(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    host = stand_ins.install(monkeypatch, "mmcv.ops.deform_conv")
    layer = host.DeformConv2d(4, 6, 3, padding=1)
    check(layer, (torch.randn(2, 4, *size), torch.randn(2, 18, *size)), host, "deform_conv")


def test_mmcv_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    host = stand_ins.install(monkeypatch, "mmcv.ops.deform_conv")
    done = check(host.DeformConv2dPack(4, 6, 3, padding=1), (torch.randn(2, 4, 9, 8),), host, "deform_conv")
    assert done.replaced[0].shared is None
    host = stand_ins.install(monkeypatch, "mmcv.ops.modulated_deform_conv")
    inputs = (torch.randn(2, 4, 9, 8), torch.randn(2, 18, 9, 8), torch.rand(2, 9, 9, 8))
    check(host.ModulatedDeformConv2d(4, 6, 3, padding=1), inputs, host, "deform_conv")
    check(host.ModulatedDeformConv2dPack(4, 6, 3, padding=1), inputs[:1], host, "deform_conv")


def test_mmcv_roi_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    host = stand_ins.install(monkeypatch, "mmcv.ops.deform_roi_pool")
    input, rois = torch.randn(2, 4, 9, 8), torch.tensor([[0.0, 1.0, 2.0, 6.0, 7.5], [1.0, 0.0, 0.0, 4.0, 3.0]])
    check(host.DeformRoIPool(2), (input, rois, torch.randn(2, 2, 2, 2)), host, "deform_roi_pool")
    done = check(host.DeformRoIPoolPack(2), (input, rois), host, "deform_roi_pool")
    assert [part.shared for part in done.replaced] == ["mmcv.ops.deform_roi_pool.deform_roi_pool"]


@pytest.mark.parametrize("kernel", [True, False])
def test_mmcv_attention(monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    host = stand_ins.install(monkeypatch, "mmcv.ops.multi_scale_deform_attn")
    value, locations, weights = attention_arguments()
    inputs = (value, torch.tensor(SHAPES), locations, weights, kernel)
    done = check(host.MultiScaleDeformableAttention(), inputs, host, "ms_deform_attn")
    assert {part.shared for part in done.replaced} == {
        "mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction",
        "mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch",
    }


def test_ultralytics(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_ins.install(monkeypatch, "ultralytics.nn.modules.utils", "ultralytics.nn.modules.transformer")
    value, locations, weights = attention_arguments(merged=True)
    host = sys.modules["ultralytics.nn.modules.utils"]
    done = check(module.MSDeformAttn(), (value, SHAPES, locations, weights), host, "ms_deform_attn")
    assert done.replaced[0].shared == "ultralytics.nn.modules.transformer.multi_scale_deformable_attn_pytorch"


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("pairs", [None, SHAPES])
def test_rfdetr(monkeypatch: pytest.MonkeyPatch, merged: bool, pairs: list[tuple[int, int]] | None) -> None:
    functions = "rfdetr.models.ops.functions"
    names = ["ultralytics.nn.modules.utils", f"{functions}.ms_deform_attn_func", functions]
    module = stand_ins.install(monkeypatch, *names, "rfdetr.models.ops.modules.ms_deform_attn")
    value, locations, weights = attention_arguments(merged)
    inputs = (value.permute(0, 2, 3, 1), torch.tensor(SHAPES), locations, weights.reshape(2, 7, 2, 6), pairs)
    check(module.MSDeformAttn(), inputs, sys.modules[f"{functions}.ms_deform_attn_func"], "ms_deform_attn")


def test_deformable_detr(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["mmcv.ops.multi_scale_deform_attn", "models.ops.functions.ms_deform_attn_func"]
    module = stand_ins.install(monkeypatch, *names, "models.ops.modules.ms_deform_attn")
    value, locations, weights = attention_arguments()
    inputs = (value, torch.tensor(SHAPES), torch.tensor([0, 30]), locations, weights)
    check(module.MSDeformAttn(), inputs, sys.modules[names[1]], "ms_deform_attn")


@pytest.mark.parametrize(
    ("module", "layer", "sizes"),
    [
        ("deformable_attention.deformable_attention_1d", "DeformableAttention1D", [(2, 16, 24)]),
        ("monai.networks.blocks.warp", "Warp", [(2, 3, 6, 7), (2, 2, 6, 7)]),
        ("voxelmorph.nn.modules", "SpatialTransformer", [(1, 2, 4, 5, 6), (1, 3, 4, 5, 6)]),
    ],
)
def test_layers_of_sampling(
    monkeypatch: pytest.MonkeyPatch, module: str, layer: str, sizes: list[tuple[int, ...]]
) -> None:
    host = stand_ins.install(monkeypatch, module)
    options = {"dim": 16, "dim_head": 4, "heads": 4} if layer.startswith("Deformable") else {}
    done = check(getattr(host, layer)(**options), tuple(map(torch.randn, sizes)), host, "deform_sample")
    assert str(done) == f"replaced 1 x {module}.{layer} by deformkit.deform_sample, in this model alone"


def test_warp_that_monai_computes_in_its_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    host = stand_ins.install(monkeypatch, "monai.networks.blocks.warp")
    for options in ({"mode": 1, "padding_mode": 0}, {"mode": "bicubic"}):
        assert not dk.patch(host.Warp(**options), strict=False).replaced
