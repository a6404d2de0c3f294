"""Patching models and layers of transformers."""

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from patched import LAYERS, SHAPES, attention, doubled, ours, tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

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

# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_model_of_transformers(zoo: ModuleType, name: str) -> None:
    options = {} if "former" in name else {"num_queries": 20}
    if name in ("deformable_detr", "grounding_dino", "mm_grounding_dino"):
        options |= {"encoder_layers": 2, "decoder_layers": 2}
    model, inputs = zoo.build(name, **options), zoo.inputs(name, 96)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        masks: list[Tensor] = []
        with deciding(exact, lambda mask: masks.append(mask) or mask):
            truth = tensors(exact(**doubled(inputs)))
        assert bool(masks) == ("former" in name)
        dk.patch(exact)
        for key, value in tensors(exact(**doubled(inputs))).items():
            torch.testing.assert_close(value, truth[key], rtol=1e-12, atol=1e-12)
        dk.unpatch(exact)
        given = cycle(masks)
        with deciding(model, lambda mask: next(given)):
            reference = tensors(model(**inputs))
            done = dk.patch(model)
            actual = tensors(model(**inputs))
    calls = ours(lambda: model(**inputs))
    assert calls["ms_deform_attn"] == max(part.count for part in done.replaced) > 0
    dk.unpatch(done)
    assert not ours(lambda: model(**inputs))
    assert actual.keys() == reference.keys()
    for key, value in actual.items():
        # Grounding DINO writes its logits into a tensor of float32.
        assert_close(value, truth[key].double(), reference[key], key)


@contextmanager
def deciding(model: nn.Module, decide: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace each attention mask that the model computes by a threshold with the result of ``decide``.

    If a value lies at the threshold, rounding decides, and everything after it differs.
    """

    def decided(made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *made[:-1], decide(made[-1])

    with ExitStack() as undo:
        for module in model.modules():
            if type(module).__name__ == "Mask2FormerMaskPredictor":
                handle = module.register_forward_hook(lambda module, args, output: decided(output))
                undo.callback(handle.remove)
            elif type(module).__name__ == "OneFormerTransformerDecoder":
                predict = module.forward_prediction_heads
                module.forward_prediction_heads = lambda *args, predict=predict, **named: decided(
                    predict(*args, **named)
                )
                undo.callback(delattr, module, "forward_prediction_heads")
        yield


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


# The layers of transformers with the three interfaces


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
    """The locations have the model's dtype; the operator takes float32."""
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


@pytest.mark.parametrize("model_type", LAYERS)
def test_gradient_of_one_image_through_batch_norm(model_type: str) -> None:
    """torch computes this wrongly on a CPU for some layouts of the gradient; the layouts of the host have to stay."""
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


DETR_LIKE = (
    "deformable_detr grounding_dino lw_detr mm_grounding_dino omdet_turbo pp_doclayout_v2 pp_doclayout_v3 "
    "pp_doclayout_v4 rf_detr rt_detr"
).split()


def whole_layer(model_type: str) -> nn.Module:
    """A small layer of a class that is replaced as a whole."""
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


@pytest.mark.parametrize("model_type", ["deformable_detr", "mask2former"])
def test_gradient_of_the_weights_that_a_layer_returns(model_type: str) -> None:
    layer, arguments = attention(model_type)

    def gradient() -> Tensor:
        output, weights = layer(**arguments)
        weights.retain_grad()
        output.square().sum().backward()
        assert weights.grad is not None
        return weights.grad

    expected = gradient()
    dk.patch(layer)
    torch.testing.assert_close(gradient(), expected)
