"""Patching host libraries: transformers' own code, and stand-ins for those that cannot be installed everywhere."""

import copy
import importlib
import importlib.util
import io
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
from close import assert_close, assert_equal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

import deformkit as dk

ZOO = Path(__file__).parents[1] / "benchmarks" / "zoo.py"
MODELS = [
    "deformable_detr",
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "deimv2",
    "pp_doclayout_v3",
    "mask2former",
    "oneformer",
    "grounding_dino",
    "mm_grounding_dino",
]
SHAPES = [(6, 5), (3, 4)]


class Ours(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deformkit":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def ours(call: Callable[[], Any]) -> Counter[str]:
    with torch.no_grad(), Ours() as counted:
        call()
    return counted.calls


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Layers as small as these mostly wait for their threads, on a busy machine long.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_stays_replaced() -> Iterator[None]:
    yield
    from deformkit._patching.swap import _shared

    names = list(_shared)
    for shared in _shared.values():
        setattr(shared.namespace, shared.name, shared.original)
    _shared.clear()
    assert not names, f"still replaced: {names}"


def doubled(value: Any) -> Any:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def tensors(output: Any) -> dict[str, Tensor]:
    leaves = {name + keystr(path): v for name, value in output.items() for path, v in tree_flatten_with_path(value)[0]}
    return {name: v for name, v in leaves.items() if isinstance(v, Tensor) and v.is_floating_point()}


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_model_of_transformers(zoo: ModuleType, name: str) -> None:
    options = {} if "former" in name else {"num_queries": 20}
    model, inputs = zoo.build(name, **options), zoo.inputs(name, 96)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        reference = tensors(model(**inputs))
        truth = tensors(exact(**doubled(inputs)))
        done = dk.patch(model)
        actual = tensors(model(**inputs))
        dk.patch(exact)
        for key, value in tensors(exact(**doubled(inputs))).items():
            torch.testing.assert_close(value, truth[key], rtol=1e-12, atol=1e-12)
        dk.unpatch(exact)
    calls = ours(lambda: model(**inputs))
    assert calls["ms_deform_attn"] == max(part.count for part in done.replaced) > 0
    dk.unpatch(done)
    assert not ours(lambda: model(**inputs))
    assert actual.keys() == reference.keys()
    for key, value in actual.items():
        # Behind it these attend where a mask that they predict passes a threshold, and rounding may decide whether.
        if "former" not in name or key.startswith("pixel_decoder"):
            # Grounding DINO writes its logits into a tensor of float32.
            assert_close(value, truth[key].double(), reference[key], key)


def test_training_step(zoo: ModuleType) -> None:
    pytest.importorskip("scipy", reason="transformers matches boxes to labels with it")
    small = {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 20, "dropout": 0.0, "attention_dropout": 0.0}
    model, inputs = zoo.build("deformable_detr", **small).train(), zoo.inputs("deformable_detr", 64)
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4) * 0.5 + 0.2}]

    def step(model: nn.Module, cast: Callable[[Any], Any] = lambda value: value) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**cast(inputs), labels=cast(labels)).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    reference, truth = step(model), step(copy.deepcopy(model).double(), doubled)
    dk.patch(model)
    actual = step(model)
    assert actual.keys() == reference.keys() and len(actual) > 100
    for key, value in actual.items():
        assert_close(value, truth[key], reference[key], key)


# The layers of transformers that hold the three interfaces


def attention(model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small layer, and arguments for it."""
    transformers = pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    width, heads, levels = 16, 2, 2
    if model_type == "deformable_detr":
        config = transformers.DeformableDetrConfig(d_model=width, num_feature_levels=levels)
        layer = module.DeformableDetrMultiscaleDeformableAttention(config, num_heads=heads, n_points=3)
    elif model_type == "mask2former":
        layer = module.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(width, heads, levels, 3)
    else:
        sizes = {"d_model": width, "decoder_attention_heads": heads, "decoder_n_levels": levels, "decoder_n_points": 3}
        if model_type == "rt_detr_v2":
            layer = module.RTDetrV2MultiscaleDeformableAttention(transformers.RTDetrV2Config(**sizes))
        else:
            sizes |= {"decoder_n_points": [3, 2], "num_feature_levels": levels}
            layer = module.DFineMultiscaleDeformableAttention(transformers.DFineConfig(**sizes))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments = {
        "hidden_states": torch.randn(2, 7, width),
        "encoder_hidden_states": torch.randn(2, 42, width),
        "reference_points": torch.rand(2, 7, 1 if "_" in model_type and model_type != "deformable_detr" else levels, 4),
        "spatial_shapes_list": SHAPES,
    }
    if model_type == "mask2former":
        arguments["reference_points"] = torch.rand(2, 7, levels, 4)
    else:
        arguments["spatial_shapes"] = torch.tensor(SHAPES)
    if model_type == "deformable_detr":
        arguments["level_start_index"] = torch.tensor([0, 30])
    return layer, arguments


LAYERS = ["deformable_detr", "mask2former", "rt_detr_v2", "d_fine"]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    layer, arguments = attention(request.param)
    yield layer, arguments
    dk.unpatch(layer)


def test_gradients(layer: tuple[nn.Module, dict[str, Any]]) -> None:
    host, arguments = layer

    def evaluate(host: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
        names = ("hidden_states", "encoder_hidden_states", "reference_points")
        leaves = {name: arguments[name].clone().requires_grad_() for name in names}
        output, weights = host(**{**arguments, **leaves})
        wanted = {**leaves, **dict(host.named_parameters())}
        grads = torch.autograd.grad(output.square().sum(), list(wanted.values()))
        return {"output": output, "weights": weights, **dict(zip(wanted, grads, strict=True))}

    reference, truth = evaluate(host, arguments), evaluate(copy.deepcopy(host).double(), doubled(arguments))
    dk.patch(host)
    actual = evaluate(host, arguments)
    for key, value in actual.items():
        assert_close(value, truth[key], reference[key], key)


def test_compile(layer: tuple[nn.Module, dict[str, Any]]) -> None:
    host, arguments = layer
    expected = host(**arguments)[0]
    dk.patch(host)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(host, backend=keep, fullgraph=True)
    actual = compiled(**arguments)[0]
    assert_close(actual, expected.double())
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes if "deformkit" in str(node.target)] == [
        "deformkit.ms_deform_attn.default"
    ]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast(layer: tuple[nn.Module, dict[str, Any]], half: torch.dtype) -> None:
    host, arguments = layer
    truth = copy.deepcopy(host).double()(**doubled(arguments))[0]
    with torch.autocast("cpu", half):
        reference = host(**arguments)[0]
        dk.patch(host)
        actual = host(**arguments)[0]
    actual.float().sum().backward()
    assert all(parameter.grad is not None for parameter in host.parameters())
    assert_close(actual.to(half), truth, reference.to(half))


def test_half_model(layer: tuple[nn.Module, dict[str, Any]], request: pytest.FixtureRequest) -> None:
    """Locations come in the model's dtype; the operator takes float32."""
    host, arguments = layer
    half = torch.bfloat16
    low = tree_map(lambda v: v.to(half) if isinstance(v, Tensor) and v.is_floating_point() else v, arguments)
    host = host.to(half)
    truth = copy.deepcopy(host).double()(**doubled(low))[0]
    reference = host(**low)[0]
    dk.patch(host)
    actual = host(**low)[0]
    assert actual.dtype == half
    assert_close(actual, truth, reference)


def test_copies(layer: tuple[nn.Module, dict[str, Any]]) -> None:
    host, arguments = layer
    names, types = list(vars(host)), [type(module) for module in host.modules()]
    state, text = host.state_dict(), repr(host)
    expected = host(**arguments)[0]
    done = dk.patch(host)
    patched = host(**arguments)[0]
    assert list(host.state_dict()) == list(state) and repr(host) == text
    file = io.BytesIO()
    torch.save(host, file)
    file.seek(0)
    copies = [
        copy.deepcopy(host),
        copy.copy(host),
        pickle.loads(pickle.dumps(host)),
        torch.load(file, weights_only=False),
    ]
    for one in copies:
        assert ours(lambda one=one: one(**arguments))["ms_deform_attn"] == 1
        assert_equal(one(**arguments)[0], patched)
    dk.unpatch(done)
    for one in copies:
        dk.unpatch(one)
        assert not ours(lambda one=one: one(**arguments))
        assert_equal(one(**arguments)[0], expected)
    for one in [host, *copies]:
        assert list(vars(one)) == names and [type(module) for module in one.modules()] == types


@pytest.mark.parametrize("model_type", LAYERS)
def test_gradient_of_one_image_through_batch_norm(model_type: str) -> None:
    """Which torch gets wrong on a CPU for some layouts of the gradient; those of the host have to stay."""
    host, arguments = attention(model_type)
    arguments = {name: value[:1] if name in ONE_IMAGE else value for name, value in arguments.items()}
    maps = [torch.randn(1, 16, *size) for size in SHAPES]
    norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in SHAPES).eval()

    def gradients(cast: Callable[[Any], Any]) -> list[Tensor]:
        layer, norm = copy.deepcopy(host), copy.deepcopy(norms)
        leaves = [cast(m).clone().requires_grad_() for m in maps]
        if leaves[0].dtype == torch.float64:
            layer, norm = layer.double(), norm.double()
        normed = [n(leaf).flatten(2).permute(0, 2, 1) for n, leaf in zip(norm, leaves, strict=True)]
        output = layer(**{**cast(arguments), "encoder_hidden_states": torch.cat(normed, 1)})[0]
        return list(torch.autograd.grad(output.square().sum(), leaves))

    reference, truth = gradients(lambda value: value), gradients(doubled)
    dk.patch(host)
    for actual, true, known in zip(gradients(lambda value: value), truth, reference, strict=True):
        assert_close(actual, true, known)
    dk.unpatch(host)


ONE_IMAGE = ("hidden_states", "encoder_hidden_states", "reference_points")


def test_discrete() -> None:
    layer, arguments = attention("rt_detr_v2")
    layer.method = "discrete"
    arguments["reference_points"] = arguments["reference_points"] * 1.6 - 0.3
    expected = layer(**arguments)[0]
    dk.patch(layer)
    assert_close(layer(**arguments)[0], expected.double())
    assert ours(lambda: layer(**arguments))["ms_deform_attn"] == 1
    dk.unpatch(layer)


def test_only_the_given_instances() -> None:
    for model_type in ("deformable_detr", "mask2former", "d_fine"):
        (one, arguments), (other, _) = attention(model_type), attention(model_type)
        done = dk.patch(one)
        assert {part.shared for part in done.replaced} == {None}
        assert "in this model alone" in str(done)
        assert not ours(lambda other=other, arguments=arguments: other(**arguments))


def test_shared_functions_come_back_with_the_last_model() -> None:
    (one, arguments), (other, _) = attention("rt_detr_v2"), attention("rt_detr_v2")
    module = sys.modules[type(one).__module__]
    original = module.multi_scale_deformable_attention_v2
    done, second = dk.patch(one), dk.patch(other)
    name = f"{module.__name__}.multi_scale_deformable_attention_v2"
    assert [part.shared for part in done.replaced] == [part.shared for part in second.replaced] == [name]
    assert "for every model that looks it up" in str(done)
    dk.unpatch(one)
    assert ours(lambda: other(**arguments)) and module.multi_scale_deformable_attention_v2 is not original
    dk.unpatch(one)
    assert ours(lambda: other(**arguments))
    dk.unpatch(second)
    assert module.multi_scale_deformable_attention_v2 is original


def test_part_of_a_model_holds_shared_functions_too() -> None:
    layer, _ = attention("rt_detr_v2")
    module = sys.modules[type(layer).__module__]
    original = module.multi_scale_deformable_attention_v2
    whole = nn.Sequential(layer)
    dk.patch(layer)
    dk.patch(whole)
    dk.unpatch(whole)
    assert module.multi_scale_deformable_attention_v2 is original


def test_who_replaced_a_shared_function_after_us_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = attention("rt_detr_v2")
    module = sys.modules[type(layer).__module__]
    monkeypatch.setattr(module, "multi_scale_deformable_attention_v2", module.multi_scale_deformable_attention_v2)
    dk.patch(layer)
    module.multi_scale_deformable_attention_v2 = theirs = object()
    dk.unpatch(layer)
    assert module.multi_scale_deformable_attention_v2 is theirs


def test_shared_function_that_someone_put_back_is_replaced_again() -> None:
    layer, arguments = attention("rt_detr_v2")
    module = sys.modules[type(layer).__module__]
    original = module.multi_scale_deformable_attention_v2
    dk.patch(layer)
    module.multi_scale_deformable_attention_v2 = original
    dk.patch(layer)
    assert ours(lambda: layer(**arguments))
    dk.unpatch(layer)
    assert module.multi_scale_deformable_attention_v2 is original


def test_twice(layer: tuple[nn.Module, dict[str, Any]]) -> None:
    host, arguments = layer
    first, second = dk.patch(host), dk.patch(host)
    assert first.replaced and not first.already
    assert not second.replaced and second.already == first.replaced
    assert str(second).startswith("already replaced 1 x transformers.models")
    assert ours(lambda: host(**arguments)) == {"ms_deform_attn": 1}
    dk.unpatch(host)
    assert not ours(lambda: host(**arguments))


def test_layer_that_someone_gave_a_forward_stays() -> None:
    layer, _ = attention("deformable_detr")
    layer.attn.forward = lambda *args: None
    assert not dk.patch(layer, strict=False).replaced


DETR_LIKE = (
    "deformable_detr grounding_dino lw_detr mm_grounding_dino omdet_turbo pp_doclayout_v2 pp_doclayout_v3 "
    "pp_doclayout_v4 rf_detr rt_detr"
).split()


def whole_layer(model_type: str) -> nn.Module:
    """A small layer of the kind that is replaced as a whole."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    (cls,) = (value for name, value in vars(module).items() if name.endswith("MultiscaleDeformableAttention"))
    if model_type in DETR_LIKE:
        config = SimpleNamespace(d_model=16, num_feature_levels=2, disable_custom_kernels=True)
        return cls(config, num_heads=2, n_points=3)
    return cls(16, 2, 2, 3)


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("model_type", [*DETR_LIKE, "mask2former", "oneformer"])
def test_whole_layer(model_type: str, mask: bool, coordinates: int) -> None:
    pytest.importorskip("transformers")
    host = whole_layer(model_type).double()
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments = doubled(
        {
            "hidden_states": torch.randn(2, 7, 16),
            "position_embeddings": torch.randn(2, 7, 16) if mask else None,
            "encoder_hidden_states": torch.randn(2, 42, 16),
            "attention_mask": torch.rand(2, 42) < 0.7 if mask else None,
            "reference_points": torch.rand(2, 7, 2, coordinates),
            "spatial_shapes": torch.tensor(SHAPES),
            "spatial_shapes_list": SHAPES,
            "level_start_index": torch.tensor([0, 30]),
        }
    )
    if model_type == "mask2former":
        del arguments["spatial_shapes"]
    expected = host(**arguments)
    done = dk.patch(host)
    assert done.replaced[0].operator == "nn.MSDeformAttn" and {part.shared for part in done.replaced} == {None}
    for actual, value in zip(host(**arguments), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)
    if model_type == "oneformer":
        assert_equal(host(**{**arguments, "spatial_shapes_list": None})[0], host(**arguments)[0])
    arguments["reference_points"] = arguments["reference_points"][..., :1]
    with pytest.raises(ValueError, match="reference_points has shape"):
        host(**arguments)


def test_hooks_of_the_core_see_what_it_gets() -> None:
    host, arguments = attention("deformable_detr")
    seen: list[tuple[Any, ...]] = []
    host.attn.register_forward_hook(lambda module, args, output: seen.append(args))
    host(**arguments)
    dk.patch(host)
    host(**arguments)
    theirs, ours = seen
    torch.testing.assert_close(list(ours), list(theirs))


def test_weights_that_a_model_records() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"], depths=[1, 1, 1, 1]),
        encoder_layers=1,
        decoder_layers=1,
        num_queries=5,
    )
    model = transformers.DeformableDetrModel(config).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels, output_attentions=True)
        dk.patch(model)
        actual = model(pixels, output_attentions=True)
    for name in ("encoder_attentions", "cross_attentions"):
        values = getattr(expected, name)
        assert values
        torch.testing.assert_close(getattr(actual, name), values)


def test_layer_of_another_release_stays() -> None:
    """One whose forward takes what ours does not know: its core is replaced, as ever."""
    host, _ = attention("deformable_detr")
    base: Any = type(host)

    def forward(self: Any, hidden_states: Tensor, rotation: Tensor | None = None) -> Tensor:
        return hidden_states

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    host.__class__ = type(base.__name__, (base,), names)
    assert [part.operator for part in dk.patch(host).replaced] == ["ms_deform_attn"]


# Other hosts themselves, where somebody has them


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


# Stand-ins of other hosts: their names and formulas, our code


def attention_arguments(merged: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights with two levels and three points each."""
    weights = torch.rand(2, 7, 2, 2, 3)
    locations = torch.rand(2, 7, 2, 2, 3, 2) * 1.4 - 0.2
    if merged:
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    return torch.randn(2, 42, 2, 4), locations, weights


def check(model: nn.Module, inputs: tuple[Any, ...], host: ModuleType, operator: str) -> dk._patching.Patch:
    """A patched model gives what the host gives, without calling it, and is restored."""
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


# What it refuses, and what it leaves alone


def test_nothing_to_replace() -> None:
    model = nn.Sequential(nn.Linear(2, 2), dk.nn.DeformConv2d(2, 2, 3))
    with pytest.raises(ValueError, match="model is a Sequential without any deformable part of transformers, "):
        dk.patch(model)
    done = dk.patch(model, strict=False)
    assert not done.replaced and str(done) == "replaced nothing"
    dk.unpatch(done)


@pytest.mark.parametrize("model", [None, nn.Linear, "model"])
def test_no_module(model: Any) -> None:
    for function in (dk.patch, dk.unpatch):
        with pytest.raises(TypeError, match=f"model is a {type(model).__name__}; it must be a torch.nn.Module"):
            function(model)


def test_imports_nothing() -> None:
    program = """
import sys, torch, deformkit as dk
dk.patch(torch.nn.Linear(2, 2), strict=False)
assert not {"transformers", "torchvision", "mmcv", "ultralytics", "deformkit.compat"} & set(sys.modules)
assert dk.compat.__name__ == "deformkit.compat" and callable(dk.patch)
try:
    dk.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
