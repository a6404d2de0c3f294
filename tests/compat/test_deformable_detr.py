"""The names of Deformable DETR are compared with the ports of its layer and its function in transformers."""

from types import SimpleNamespace
from typing import Any

import drawn
import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.compat import deformable_detr as compat

modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
SHAPES = torch.tensor([[5, 7], [3, 4]])
STARTS = torch.tensor([0, 35])


def published(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The function of transformers."""
    return modeling.MultiScaleDeformableAttention()(value, shapes, shapes.tolist(), starts, locations, weights, 64)


def call(seed: int) -> dict[str, Any]:
    """The arguments of a random call, by name, in float64."""
    case = drawn.attention(seed)
    named = case.arguments(torch.float64, seed=seed)
    form = (len(case.sizes), case.points[0])
    shapes = torch.tensor(case.sizes)
    return {
        "value": named["value"],
        "shapes": shapes,
        "starts": torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)[:-1]]),
        "locations": named["sampling_locations"].unflatten(3, form),
        "weights": named["attention_weights"].unflatten(3, form),
    }


def functions() -> dict[str, Any]:
    def by_apply(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 2)

    def by_core(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return compat.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    return {"apply": by_apply, "core": by_core}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", functions())
def test_functions(name: str, seed: int) -> None:
    """Compare values and every gradient."""
    given = list(call(seed).values())
    expected = evaluate(published, given, [0, 3, 4], torch.float64)
    for result, *pair in zip(
        ("output", "value", "locations", "weights"),
        evaluate(functions()[name], given, [0, 3, 4], torch.float64),
        expected,
        strict=True,
    ):
        assert_close(*pair, name=result)


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
def test_the_layer(coordinates: int) -> None:
    """The state-dict, the output and the gradient of every parameter are those of the port."""
    theirs = modeling.DeformableDetrMultiscaleDeformableAttention(
        SimpleNamespace(d_model=24, num_feature_levels=2, disable_custom_kernels=True), 3, 2
    ).double()
    ours = compat.MSDeformAttn(24, n_levels=2, n_heads=3, n_points=2).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    query, features = torch.randn(2, 6, 24).double(), torch.randn(2, 47, 24).double()
    reference, padding = torch.rand(2, 6, 2, coordinates).double(), torch.rand(2, 47) < 0.2
    expected, _ = theirs(
        query,
        attention_mask=~padding,
        encoder_hidden_states=features,
        reference_points=reference,
        spatial_shapes=SHAPES,
        spatial_shapes_list=SHAPES.tolist(),
        level_start_index=STARTS,
    )
    actual = ours(query, reference, features, SHAPES, STARTS, padding)
    assert_close(actual, expected.detach())
    grads = [
        torch.autograd.grad(o.square().sum(), list(m.parameters())) for o, m in ((actual, ours), (expected, theirs))
    ]
    for (name, _), *pair in zip(ours.named_parameters(), *grads, strict=True):
        assert_close(*pair, name=name)


def test_a_transformer_that_resets_its_layers() -> None:
    """Deformable DETR does the same after it has drawn every parameter anew."""
    layer = compat.MSDeformAttn(8, 2, 2, 3)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    layer._reset_parameters()
    for name in ("sampling_offsets.weight", "sampling_offsets.bias", "attention_weights.weight", "value_proj.bias"):
        assert_equal(layer.state_dict()[name], start[name], name)
    assert layer.value_proj.weight.std() > 0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_locations_are_read_as_float32(half: torch.dtype) -> None:
    given = call(3)
    value, weights = given["value"].to(half), given["weights"].to(half)
    locations = given["locations"].to(half)
    output = compat.MSDeformAttnFunction.apply(value, given["shapes"], given["starts"], locations, weights, 64)
    assert_equal(output, compat.ms_deform_attn_core_pytorch(value, given["shapes"], locations.float(), weights.float()))
    assert output.dtype == half


def test_autocast() -> None:
    """Under autocast the function gets a half-precision value, and weights from a softmax in float32."""
    layer = compat.MSDeformAttn(16, n_levels=2, n_heads=2)
    call = (torch.randn(1, 4, 16), torch.rand(1, 4, 2, 2), torch.randn(1, 47, 16), SHAPES, STARTS)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(*call)
    assert output.dtype == torch.bfloat16
    assert_close(output, layer.double()(*(t.double() if t.is_floating_point() else t for t in call)).detach())


@pytest.mark.parametrize("wrong", [torch.tensor([0, 34]), [0, 0], torch.tensor([0])])
def test_levels_that_start_elsewhere(wrong: Any) -> None:
    value, locations, weights = torch.randn(1, 47, 2, 3), torch.rand(1, 4, 2, 2, 3, 2), torch.rand(1, 4, 2, 2, 3)
    with pytest.raises(ValueError, match=r"level_start_index is .* it must be \[0, 35\]"):
        compat.MSDeformAttnFunction.apply(value, SHAPES, wrong, locations, weights, 64)
    layer = compat.MSDeformAttn(8, n_levels=2, n_heads=2)
    with pytest.raises(ValueError, match=r"level_start_index is .* it must be \[0, 35\]"):
        layer(torch.randn(1, 4, 8), torch.rand(1, 4, 2, 2), torch.randn(1, 47, 8), SHAPES, wrong)


def test_an_index_on_another_device_is_not_read() -> None:
    value, locations, weights = torch.randn(1, 47, 2, 3), torch.rand(1, 4, 2, 2, 3, 2), torch.rand(1, 4, 2, 2, 3)
    elsewhere = torch.empty(2, dtype=torch.int64, device="meta")
    output = compat.MSDeformAttnFunction.apply(value, SHAPES, elsewhere, locations, weights, 64)
    assert_equal(output, dk.ms_deform_attn(value, SHAPES, locations, weights))


def test_compiles_with_sizes_as_numbers() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def function(value: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return compat.MSDeformAttnFunction.apply(value, [(5, 7), (3, 4)], starts, locations, weights, 64)

    given = torch.randn(1, 47, 2, 3), STARTS, torch.rand(1, 4, 2, 2, 3, 2), torch.rand(1, 4, 2, 2, 3)
    assert_equal(function(*given), dk.ms_deform_attn(given[0], SHAPES, *given[2:]))


def test_locations_of_another_form_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"sampling_locations has shape \[1, 4, 2, 3, 2\]; it must be"):
        compat.ms_deform_attn_core_pytorch(
            torch.randn(1, 35, 2, 3), [(5, 7)], torch.rand(1, 4, 2, 3, 2), torch.rand(1, 4, 2, 3)
        )
