"""Import shims: modules for old programs compute the published formulas and replace no real module unasked."""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawn
import published
import pytest
import torch
from shims import as_function, compare, found
from torch import Tensor, nn

from deformkit import compat
from deformkit import nn as layers
from deformkit._testing import assert_close, assert_equal

NAMES = (
    "MultiScaleDeformableAttention",
    "groundingdino._C",
    "DCNv3",
    "DCNv4",
    "mmcv._ext",
    "_ext",
    "dcn_v2",
    "DCN",
    "D3D",
    "deformable_aggregation_ext",
    "deformable_aggregation_with_depth_ext",
    "deform_attn",
    "alt_cuda_corr",
    "corr_sampler",
)


@pytest.mark.parametrize("name", ["MultiScaleDeformableAttention", "groundingdino._C"])
@pytest.mark.parametrize("seed", range(4))
def test_attention(name: str, seed: int) -> None:
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    module, case = found(name), drawn.attention(seed)
    named, form = case.arguments(torch.float64, seed=seed), (len(case.sizes), case.points[0])
    shapes = torch.tensor(case.sizes)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)[:-1]])
    locations, weights = (named[key].unflatten(3, form) for key in ("sampling_locations", "attention_weights"))

    def forward(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return module.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)

    def backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
        return module.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, 64)

    def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        core = modeling.MultiScaleDeformableAttention()
        return core(value, shapes, shapes.tolist(), starts, locations, weights, 64)

    compare(as_function(forward, backward), theirs, [named["value"], locations, weights])


@dataclass
class Aggregation:
    """A random call of DCNv3 or DCNv4: the numbers that both take, the field, and the offset and weight of each tap."""

    seed: int
    softmax: bool = False

    def __post_init__(self) -> None:
        dilation = (1 + self.seed % 2, 1 + self.seed // 2 % 2)
        case = drawn.conv(self.seed, kernel_size=(3, 3), size=(6, 7), dilation=dilation)
        self.remove_center = self.seed % 3 == 0
        self.group, self.scale = case.offset_groups, 0.5 + self.seed / 4
        self.pairs = [(3, 3), case.stride, case.padding, case.dilation]
        channels = case.channels // self.group
        self.numbers = (*(n for pair in self.pairs for n in pair), self.group, channels, self.scale)
        taps, out = 9 - self.remove_center, case.arguments()["offset"].shape[2:]
        self.input = torch.randn(case.batch, *case.size, case.channels).double()
        self.offset = torch.randn(case.batch, *out, self.group, taps, 2).double() * 2
        self.mask = torch.randn(case.batch, *out, self.group, taps).double()

    def published(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """The formula, for flat offsets and weights and for others."""
        mask = mask.reshape(self.mask.shape)
        mask = mask.softmax(-1) if self.softmax else mask
        rest = (self.group, self.scale, self.remove_center)
        return published.aggregate(input, offset.reshape(self.offset.shape), mask, *self.pairs, *rest)


@pytest.mark.parametrize("seed", range(6))
def test_dcnv3(seed: int) -> None:
    module, call = found("DCNv3"), Aggregation(seed)

    def forward(input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return module.dcnv3_forward(input, offset, mask, *call.numbers, 256, int(call.remove_center))

    def backward(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
        return module.dcnv3_backward(*tensors, *call.numbers, grad, 256, int(call.remove_center))

    tensors = [call.input, call.offset.flatten(3), call.mask.flatten(3)]
    compare(as_function(forward, backward), call.published, tensors)
    compare(as_function(forward, backward), call.published, [*tensors[:2], call.mask])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_dcnv4(seed: int, softmax: bool) -> None:
    """Offsets and weights in one tensor, followed by unused channels."""
    module, call = found("DCNv4"), Aggregation(seed, softmax)
    offsets = call.mask.shape[-1] * 2
    packed = torch.cat([call.offset.flatten(-2), call.mask], -1).flatten(3)
    used = packed.shape[-1]
    packed = torch.cat([packed, torch.randn(*packed.shape[:-1], -used % 8).double()], -1)

    def forward(input: Tensor, packed: Tensor) -> Tensor:
        return module.ext.dcnv4_forward(input, packed, *call.numbers, 256, int(call.remove_center), 8, 64, softmax)

    def backward(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
        numbers = (*call.numbers, 256, grad, int(call.remove_center), 2, 64, softmax)
        return module.ext.dcnv4_backward(*tensors, *numbers)

    def theirs(input: Tensor, packed: Tensor) -> Tensor:
        by_group = packed[..., :used].unflatten(-1, (call.group, -1))
        return call.published(input, by_group[..., :offsets], by_group[..., offsets:])

    compare(as_function(forward, backward), theirs, [call.input, packed])
    if not softmax:
        apply = module.functions.DCNv4Function.apply
        numbers = (*call.numbers, 256, int(call.remove_center))
        compare(lambda *tensors: apply(*tensors, *numbers), theirs, [call.input, packed])


def test_the_layer_of_dcnv4() -> None:
    """The layer loads a published state-dict as it is; :class:`deformkit.nn.DCNv4` needs a converted one."""
    found("DCNv4")
    from DCNv4.modules.dcnv4 import DCNv4  # type: ignore[import-not-found]

    theirs = DCNv4(16, group=2, dw_kernel_size=3, center_feature_scale=True, remove_center=1, norm_layer="LN")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = layers.DCNv4(16, group=2, dw_kernel_size=3, center_feature_scale=True, remove_center=True)
    ours.load_state_dict(layers.dcnv4_state_dict(theirs.state_dict(), kernel_size=3, group=2, remove_center=True))
    input = torch.randn(2, 25, 16)
    expected = ours(input, (5, 5))
    assert_close(theirs(input).detach(), expected.detach().double())
    assert_close(theirs(input, (5, 5)).detach(), expected.detach().double())
    with pytest.raises(ValueError, match="24 positions are no square"):
        theirs(torch.randn(2, 24, 16))


def test_the_layer_of_dcnv4_in_a_network_that_resets_it() -> None:
    """FlashInternImage does this with each layer of a class that it looks up by name in the package."""
    module = found("DCNv4")
    network = nn.Sequential(nn.LayerNorm(16), module.DCNv4(channels=16, group=1, output_bias=False))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    network.apply(lambda m: m._reset_parameters() if isinstance(m, getattr(module, "DCNv4")) else None)  # noqa: B009
    layer = network[1]
    assert not layer.offset_mask.weight.any() and not layer.offset_mask.bias.any() and not layer.value_proj.bias.any()
    assert layer.value_proj.weight.std() > 0 and layer.output_proj.weight.std() > 0


@pytest.mark.parametrize("seed", range(6))
def test_dcn_v2(seed: int) -> None:
    module = found("_ext")
    case = drawn.conv(seed, modulated=True, bias=True, groups=1)
    named = case.arguments(torch.float64, seed=seed)
    steps = [named[name] for name in ("stride", "padding", "dilation")]
    numbers = (*case.kernel_size, *(n for pair in steps for n in pair), case.offset_groups)

    def forward(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return module.dcn_v2_forward(input, weight, bias, offset, mask, *numbers)

    def backward(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
        input, offset, mask, weight, bias = tensors
        return module.dcn_v2_backward(input, weight, bias, offset, mask, grad, *numbers)

    def theirs(*tensors: Tensor) -> Tensor:
        return published.modulated_conv(*tensors, *steps, 1, case.offset_groups)

    tensors = [named[name] for name in ("input", "offset", "mask", "weight", "bias")]
    compare(as_function(forward, backward), theirs, tensors)
    conv = found("dcn_v2").dcn_v2_conv
    compare(lambda *t: conv(*t, *steps, case.offset_groups), theirs, tensors)


def test_the_layers_of_dcn_v2() -> None:
    module = found("dcn_v2")
    layer = module.DCN(8, 4, kernel_size=(3, 3), stride=2, padding=1, deformable_groups=2)
    names = {"weight", "bias", "conv_offset_mask.weight", "conv_offset_mask.bias"}
    assert set(layer.state_dict()) == names
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    packed = layers.PackedDeformConv2d(8, 4, 3, 2, 1, modulated=True, offset_groups=2).double()
    packed.load_state_dict(compat.convert.from_mmcv(layer.state_dict(), modulated=True))
    x = torch.randn(2, 8, 6, 7)
    assert_close(layer.double()(x.double()).detach(), packed(x.double()).detach())
    predicted = layer.conv_offset_mask(x.double())
    given = module.DCNv2(8, 4, 3, 2, 1, deformable_groups=2).double()
    given.load_state_dict({name: layer.state_dict()[name] for name in ("weight", "bias")})
    assert_equal(given(x.double(), predicted[:, :36], predicted[:, 36:].sigmoid()), layer(x.double()))


@pytest.mark.parametrize("name", ["dcnv3", "dcn_v2", "attention"])
def test_errors_of_backward_functions(name: str) -> None:
    """A gradient of the wrong shape raises an error that names it before any kernel runs."""
    grad = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"grad_output has shape \[1, 2, 3\]; the output has"):
        if name == "dcnv3":
            tensors = torch.zeros(1, 5, 5, 4), torch.zeros(1, 5, 5, 18), torch.zeros(1, 5, 5, 9)
            found("DCNv3").dcnv3_backward(*tensors, 3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 1.0, grad, 256, 0)
        elif name == "dcn_v2":
            tensors = torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 3, 3), torch.zeros(2)
            given = torch.zeros(1, 18, 3, 3), torch.zeros(1, 9, 3, 3)
            found("_ext").dcn_v2_backward(*tensors, *given, grad, 3, 3, 1, 1, 0, 0, 1, 1, 1)
        else:
            tensors = torch.zeros(1, 4, 1, 2), [(2, 2)], [0], torch.zeros(1, 3, 1, 1, 1, 2), torch.zeros(1, 3, 1, 1, 1)
            found("groundingdino._C").ms_deform_attn_backward(*tensors, grad, 64)


def test_errors_of_forward_functions() -> None:
    tensors = torch.zeros(1, 5, 5, 4), torch.zeros(1, 5, 5, 18), torch.zeros(1, 5, 5, 9)
    forward = found("DCNv3").dcnv3_forward
    with pytest.raises(ValueError, match=r"input has shape .* group=2 and group_channels=4"):
        forward(*tensors, 3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0, 256, 0)
    with pytest.raises(ValueError, match=r"offset has shape .*; it must be \[N, Hout, Wout, 36\]"):
        forward(*tensors, 3, 3, 1, 1, 1, 1, 1, 1, 2, 2, 1.0, 256, 0)
    for shape in ((1, 5, 5, 9, 1), (1, 5, 5, 8)):
        with pytest.raises(ValueError, match=r"mask has shape .*; it must be \[N, Hout, Wout, 9\]"):
            forward(*tensors[:2], torch.zeros(shape), 3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 1.0, 256, 0)
    with pytest.raises(ValueError, match=r"p_offset has shape .*; it must be \[N, Hout, Wout, 32\]"):
        found("DCNv4").dcnv4_forward(*tensors[:2], 3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 1.0)


def test_half_gradients_have_the_dtype_of_their_tensors() -> None:
    module = found("MultiScaleDeformableAttention")
    value, locations = torch.randn(1, 4, 1, 2).half(), torch.rand(1, 3, 1, 1, 1, 2).half()
    grads = module.ms_deform_attn_backward(
        value, [(2, 2)], [0], locations, torch.rand(1, 3, 1, 1, 1).half(), torch.randn(1, 3, 2).half(), 64
    )
    assert [grad.dtype for grad in grads] == [torch.float16] * 3


def test_every_name() -> None:
    assert compat.install() == NAMES
    assert compat.install() == NAMES, "twice is as good as once"
    for name in NAMES:
        module = importlib.import_module(name)
        assert module.__name__.startswith("deformkit.compat.") and module.__version__.startswith("deformkit ")
        assert module.__doc__ is not None and module.__doc__.startswith("Stands in for") and name in module.__doc__
    assert compat.uninstall("DCNv3", "DCNv4") == ("DCNv3", "DCNv4")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("DCNv4.functions")
    assert compat.uninstall() == tuple(name for name in NAMES if not name.startswith("DCNv"))
    assert compat.uninstall() == ()
    for name in NAMES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_unknown_names() -> None:
    for function in (compat.install, compat.uninstall):
        with pytest.raises(ValueError, match=r"'mmcv\.ops' cannot be installed; there are 'MultiScale"):
            function("DCNv3", "mmcv.ops")
    assert "DCNv3" not in sys.modules


def test_a_module_that_can_be_imported_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "DCNv3.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.install("DCNv3", "_ext") == ("_ext",)
    real = importlib.import_module("DCNv3")
    assert real.real
    assert compat.install("DCNv3", force=True) == ("DCNv3",)
    assert not hasattr(importlib.import_module("DCNv3"), "real")
    assert compat.uninstall("DCNv3") == ("DCNv3",)
    assert importlib.import_module("DCNv3") is real


@pytest.mark.parametrize("names", [(), ("dcn_v2", "_ext")], ids=["all", "by-name"])
def test_layers_that_lack_only_their_extension_stay(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dcn_v2.py").write_text("import _ext as backend")
    monkeypatch.syspath_prepend(tmp_path)
    assert "_ext" in compat.install(*names) and "dcn_v2" not in compat.install(*names)
    assert importlib.import_module("dcn_v2").backend is importlib.import_module("_ext")


def test_a_module_that_raises_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension fails like this if it was built for another torch or needs a GPU."""
    (tmp_path / "DCNv4" / "functions").mkdir(parents=True)
    (tmp_path / "DCNv4" / "__init__.py").write_text("from . import functions")
    (tmp_path / "DCNv4" / "functions" / "__init__.py").write_text("raise NotImplementedError('no such GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.install("DCNv4") == ("DCNv4",)
    import DCNv4.functions.dcnv4_func as functions

    assert functions.__name__.startswith("deformkit.")


@pytest.mark.parametrize("first", ["install", "import"])
def test_a_submodule_of_a_real_package(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grounding DINO itself is installed; only its compiled part is missing."""
    (tmp_path / "groundingdino").mkdir()
    (tmp_path / "groundingdino" / "__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    if first == "import":
        importlib.import_module("groundingdino")
    assert compat.install("groundingdino._C") == ("groundingdino._C",)
    scope: dict[str, Any] = {}
    exec("import groundingdino\nfrom groundingdino import _C", scope)
    assert scope["groundingdino"].real and scope["_C"].__name__.startswith("deformkit.")
    compat.uninstall()
    with pytest.raises(ImportError):
        exec("from groundingdino import _C", {})


def test_nothing_of_this_is_imported_unasked() -> None:
    code = "import sys, deformkit; print([name for name in sys.modules if name.startswith('deformkit.compat')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_hosts_are_found_by_name() -> None:
    for name in ("convert", "deformable_detr", "mmcv", "torchvision"):
        assert getattr(compat, name).__name__ == f"deformkit.compat.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'detectron2'"):
        compat.detectron2  # noqa: B018
