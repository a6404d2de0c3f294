"""The layer of multi-scale deformable attention is compared with that of Deformable DETR."""

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal
from deformkit.nn import MSDeformAttn

SHAPES = {1: [(9,), (4,)], 2: [(5, 7), (3, 2)], 3: [(3, 4, 5), (2, 2, 3)]}


def length(axes: int) -> int:
    return sum(map(math.prod, SHAPES[axes]))


def inputs(axes: int, boxes: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "query": torch.randn(2, 6, 24, dtype=dtype),
        "reference_points": torch.rand(2, 6, 2, axes * (1 + boxes), dtype=torch.promote_types(dtype, torch.float32)),
        "input_flatten": torch.randn(2, length(axes), 24, dtype=dtype),
        "input_spatial_shapes": SHAPES[axes],
    }


def layer(axes: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> MSDeformAttn:
    """A layer whose predictions depend on the query."""
    made = MSDeformAttn(24, 2, 4, **{"n_points": 3, **options}, spatial_dims=axes, dtype=dtype)
    for head in (made.sampling_offsets, made.attention_weights):
        nn.init.normal_(head.weight, std=0.3)
        nn.init.normal_(head.bias)
    return made


def theirs(n_points: int = 3) -> nn.Module:
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = SimpleNamespace(d_model=24, num_feature_levels=2, disable_custom_kernels=True)
    with pytest.warns(UserWarning, match="power of 2"):
        return module.DeformableDetrMultiscaleDeformableAttention(config, 4, n_points).double()


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_outputs_and_gradients_are_those_of_deformable_detr(boxes: bool, padding: bool) -> None:
    other, ours = theirs(), layer()
    other.load_state_dict(ours.state_dict(), strict=True)
    given = inputs(2, boxes)
    mask = torch.rand(2, length(2)) < 0.3 if padding else None
    leaves = [given[name].requires_grad_() for name in ("query", "reference_points", "input_flatten")]
    shapes = torch.tensor(SHAPES[2])
    output = ours(**given, input_level_start_index=torch.tensor([0, 35]), input_padding_mask=mask)
    expected, _ = other(
        leaves[0],
        None if mask is None else ~mask,
        encoder_hidden_states=leaves[2],
        reference_points=leaves[1],
        spatial_shapes=shapes,
        spatial_shapes_list=SHAPES[2],
        level_start_index=torch.tensor([0, 35]),
    )
    assert_close(output, expected.detach())
    cotangent = torch.randn_like(output)
    names = ["query", "reference_points", "input_flatten", *(name for name, _ in ours.named_parameters())]
    found, truth = (
        torch.autograd.grad(result, [*leaves, *module.parameters()], cotangent)
        for result, module in ((output, ours), (expected, other))
    )
    for name, one, two in zip(names, found, truth, strict=True):
        assert two.any(), name
        assert_close(one, two, name=name)


def bare_model(module: Any) -> Any:
    """A model that serves only to initialise its parts."""
    model = object.__new__(module.DeformableDetrPreTrainedModel)
    model.__dict__["config"] = SimpleNamespace(initializer_range=0.02)
    return model


def test_state_dict_and_initialisation_are_those_of_deformable_detr() -> None:
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    other, ours = theirs(), MSDeformAttn(24, 2, 4, 3, dtype=torch.float64)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    module.DeformableDetrPreTrainedModel._init_weights(bare_model(module), other)
    for name, value in other.state_dict().items():
        if name not in ("value_proj.weight", "output_proj.weight"):
            # transformers computes the angles in float32.
            assert_close(ours.state_dict()[name].float(), value, name=name)
    bound = math.sqrt(6 / 48)
    for projection in (ours.value_proj, ours.output_proj):
        assert 0.9 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 13])
def test_each_head_of_a_new_layer_samples_in_its_own_direction(axes: int, heads: int) -> None:
    made = MSDeformAttn(4 * heads, 2, heads, [2, 3], spatial_dims=axes)
    offsets = made.sampling_offsets.bias.detach().unflatten(0, (heads, 5, axes))
    largest = offsets.abs().amax(-1)
    assert_close(largest, torch.tensor([1.0, 2, 1, 2, 3], dtype=torch.float64).expand(heads, 5))
    directions = nn.functional.normalize(offsets[:, 0].double(), dim=-1)
    assert_close(nn.functional.normalize(offsets[:, -1], dim=-1), directions)
    if axes == 1:
        assert directions.flatten().tolist() == [(-1.0) ** h for h in range(heads)]
    elif heads > 1:
        nearest = (directions @ directions.T).fill_diagonal_(-1).amax()
        if axes == 2:
            assert_close(nearest.float(), torch.tensor(2 * math.pi / heads, dtype=torch.float64).cos())
        else:  # farther apart than three quarters of the side of a square with a head's share of the sphere
            assert nearest < math.cos(0.75 * math.sqrt(4 * math.pi / heads))
    assert not made.sampling_offsets.weight.any() and not made.attention_weights.weight.any()


def test_a_new_layer_reads_around_its_reference_points(axes: int) -> None:
    made = MSDeformAttn(24, 2, 2, 2, spatial_dims=axes)
    given = inputs(axes, dtype=torch.float32)
    locations = made.sampling_locations(given["query"], given["reference_points"], SHAPES[axes])
    moved = locations - given["reference_points"][:, :, None, :, None]
    for n, size in enumerate(SHAPES[axes]):
        pixels = moved[:, :, :, n] * torch.tensor(size[::-1])
        expected = made.sampling_offsets.bias.detach().reshape(2, 2, 2, axes)[:, n].double()
        assert_close(pixels.detach(), expected.expand_as(pixels), pixels.detach())


@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("n_points", [3, [1, 4], [3, 0]], ids=str)
def test_forward_is_the_formula(axes: int, boxes: bool, n_points: Any) -> None:
    """The formula, written out for each level and each axis."""
    made, given = layer(axes, n_points=n_points), inputs(axes, boxes)
    counts = [n_points] * 2 if isinstance(n_points, int) else n_points
    query, references, start = given["query"], given["reference_points"], 0
    offsets = made.sampling_offsets(query).reshape(2, 6, 4, sum(counts), axes)
    parts = []
    for level, (size, count) in enumerate(zip(SHAPES[axes], counts, strict=True)):
        own = offsets[:, :, :, start : start + count]
        columns = []
        for n in range(axes):
            scale = references[:, :, level, axes + n, None, None] / 2 / count if boxes else 1 / size[axes - 1 - n]
            columns.append(references[:, :, level, n, None, None] + own[..., n] * scale)
        parts.append(torch.stack(columns, -1) if count else own)
        start += count
    locations = torch.cat(parts, 3)
    sampled = made.sampling_locations(query, references, SHAPES[axes])
    assert sampled.dim() == (6 if isinstance(n_points, int) else 5)
    assert_close(sampled.reshape(locations.shape), locations.detach())

    weights = made.attention_weights(query).reshape(2, 6, 4, -1).softmax(-1)
    value = made.value_proj(given["input_flatten"]).reshape(2, length(axes), 4, 6)
    expected = made.output_proj(dk.ms_deform_attn(value, SHAPES[axes], locations, weights, num_points=counts))
    assert_close(made(**given), expected.detach())


def test_one_reference_for_all_levels(axes: int) -> None:
    made, given = layer(axes), inputs(axes)
    given["reference_points"] = given["reference_points"][:, :, :1]
    output = made(**given)
    given["reference_points"] = given["reference_points"].repeat(1, 1, 2, 1)
    assert_equal(output, made(**given))


def test_padding_is_not_read(axes: int) -> None:
    made, given = layer(axes), inputs(axes)
    mask = torch.rand(2, length(axes)) < 0.5
    expected = made(**given, input_padding_mask=mask)
    given["input_flatten"][mask] = torch.nan
    assert_equal(made(**given, input_padding_mask=mask), expected)


def test_spatial_shapes_in_every_form(axes: int) -> None:
    made, given = layer(axes), inputs(axes)
    expected = made(**given)
    forms: list[Any] = [torch.tensor(SHAPES[axes], dtype=d) for d in (torch.int64, torch.int32)]
    for form in [*forms, [torch.Size(size) for size in SHAPES[axes]], *([[9, 4]] if axes == 1 else [])]:
        assert_equal(made(**{**given, "input_spatial_shapes": form}), expected)


def seen_locations(made: MSDeformAttn, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The locations that the operator gets, and the output of the layer."""
    seen = []

    def spy(value: Tensor, shapes: Any, locations: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(locations)
        return dk.ms_deform_attn(value, shapes, locations, *args, **options)

    monkeypatch.setattr("deformkit.nn.ms_deform_attn.ms_deform_attn", spy)
    output = made(**given)
    return seen[0], output


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_locations_stay_float32_in_a_half_layer(
    axes: int, boxes: bool, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = layer(axes, half), inputs(axes, boxes, half)
    locations, output = seen_locations(made, given, monkeypatch)
    assert locations.dtype == torch.float32 and output.dtype == half
    assert_equal(
        locations, made.sampling_locations(given["query"], given["reference_points"], SHAPES[axes]).flatten(3, 4)
    )
    # Half offsets of zero leave the reference points as they are.
    if not boxes:
        nn.init.zeros_(made.sampling_offsets.weight), nn.init.zeros_(made.sampling_offsets.bias)
        still = made.sampling_locations(given["query"], given["reference_points"], SHAPES[axes])
        assert_equal(still, given["reference_points"][:, :, None, :, None].expand_as(still).contiguous())


class Given(nn.Module):
    """A head with a known prediction."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, query: Tensor) -> Tensor:
        return self.prediction


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_locations_stay_float32_under_autocast(
    axes: int, boxes: bool, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = layer(axes, torch.float32), inputs(axes, boxes, torch.float32)
    truth = layer(axes, torch.float64)
    truth.load_state_dict(made.state_dict())
    with torch.autocast("cpu", dtype=half):
        locations, output = seen_locations(made, given, monkeypatch)
        output.float().sum().backward()
    assert locations.dtype == torch.float32 and output.dtype == half
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in made.parameters())
    # The offsets come from a half-precision projection; adding them to the reference points adds no further error.
    with torch.autocast("cpu", dtype=half):
        offsets = made.sampling_offsets(given["query"]).double()
    truth.sampling_offsets = Given(offsets)
    exact = truth.sampling_locations(given["query"].double(), given["reference_points"].double(), SHAPES[axes])
    assert_close(locations, exact.flatten(3, 4).detach())


def test_gradients_reach_every_parameter(axes: int) -> None:
    made = MSDeformAttn(24, 2, 4, spatial_dims=axes)
    given = inputs(axes, dtype=torch.float32)
    made(**given).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_copies(axes: int) -> None:
    made, given = layer(axes, n_points=[2, 3]), inputs(axes)
    expected = made(**given)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_equal(other(**given), expected)
    other = layer(axes, n_points=[2, 3])
    other.load_state_dict(made.state_dict(), strict=True)
    assert_equal(other(**given), expected)


def test_reset_parameters(axes: int) -> None:
    made = layer(axes)
    made.reset_parameters()
    new = MSDeformAttn(24, 2, 4, 3, spatial_dims=axes, dtype=torch.float64)
    assert_equal(made.sampling_offsets.bias, new.sampling_offsets.bias)


@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_compiles_whole_and_exports(axes: int, boxes: bool) -> None:
    torch.compiler.reset()
    made, given = layer(axes), inputs(axes, boxes)
    mask = torch.rand(2, length(axes)) < 0.3
    expected = made(**given, input_padding_mask=mask)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**given, input_padding_mask=mask), expected.detach())
    program = torch.export.export(made, (), {**given, "input_padding_mask": mask})
    assert_close(program.module()(**given, input_padding_mask=mask), expected.detach())


def test_on_the_meta_device(axes: int) -> None:
    made = MSDeformAttn(24, 2, 4, spatial_dims=axes, device="meta")
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs(axes, dtype=torch.float32).items()}
    assert made(**given).shape == (2, 6, 24)


def test_repr() -> None:
    assert "MSDeformAttn(\n  d_model=256, n_levels=4, n_heads=8, n_points=4\n" in repr(MSDeformAttn())
    text = repr(MSDeformAttn(24, 2, 4, [1, 2], spatial_dims=3))
    assert "d_model=24, n_levels=2, n_heads=4, n_points=[1, 2], spatial_dims=3\n" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_model": 30}, ValueError, "d_model is 30; it must be divisible by n_heads, which is 8"),
        ({"d_model": 25.6}, TypeError, "d_model is 25.6; it must be an int"),
        ({"n_levels": 0}, ValueError, "n_levels is 0; it must be at least 1"),
        ({"n_heads": -8}, ValueError, "n_heads is -8; it must be at least 1"),
        ({"n_points": 0}, ValueError, "n_points is 0; it must be at least 1"),
        ({"n_points": [4, 4, -1, 4]}, ValueError, "n_points is -1; it must be at least 0"),
        ({"n_points": [4, 4]}, ValueError, r"n_points is \[4, 4\]; it needs 4 numbers, one for each level"),
        ({"n_points": [0, 0, 0, 0]}, ValueError, r"n_points is \[0, 0, 0, 0\]; it needs 4 numbers, one for each level"),
        ({"n_points": 4.0}, TypeError, "n_points is 4.0; it must be an int or a sequence of ints"),
        ({"spatial_dims": 4}, ValueError, "spatial_dims is 4; it must be 1, 2 or 3"),
    ],
)
def test_a_wrong_argument_of_the_constructor_is_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        MSDeformAttn(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"query": torch.zeros(2, 6, 23)},
            ValueError,
            r"query has shape \[2, 6, 23\]; it must have 3 axes, the last of 24",
        ),
        ({"query": None}, TypeError, "query is a NoneType; it must be a torch.Tensor"),
        (
            {"input_flatten": torch.zeros(41, 24)},
            ValueError,
            r"input_flatten has shape \[41, 24\]; it must have 3 axes",
        ),
        ({"input_flatten": torch.zeros(2, 40, 24)}, ValueError, "spatial_shapes adds up to 41 = 5x7 [+] 3x2 positions"),
        ({"input_flatten": torch.zeros(1, 41, 24)}, ValueError, "input_flatten has batch size 1; query has 2"),
        (
            {"reference_points": torch.zeros(2, 6, 2, 3)},
            ValueError,
            r"reference_points has shape \[2, 6, 2, 3\]; it must be \[2, 6, 2, 2\], or with 4 coordinates for boxes",
        ),
        ({"reference_points": torch.zeros(2, 6, 3, 2)}, ValueError, r"reference_points has shape \[2, 6, 3, 2\]; "),
        ({"reference_points": torch.zeros(2, 5, 2, 2)}, ValueError, r"reference_points has shape \[2, 5, 2, 2\]; "),
        ({"reference_points": torch.zeros(2, 6, 2)}, ValueError, r"reference_points has shape \[2, 6, 2\]; "),
        (
            {"reference_points": torch.zeros(2, 6, 2, 2, dtype=torch.int64)},
            TypeError,
            "reference_points has dtype torch.int64; it must be a floating dtype",
        ),
        (
            {"input_spatial_shapes": [(5, 7)]},
            ValueError,
            "input_spatial_shapes has 1 levels; this layer has n_levels=2",
        ),
        (
            {"input_spatial_shapes": [(5, 7, 1), (3, 2, 1)]},
            ValueError,
            "input_spatial_shapes has 3 columns; this layer has spatial_dims=2",
        ),
        (
            {"input_padding_mask": torch.zeros(2, 41)},
            TypeError,
            "input_padding_mask has dtype torch.float32; it must be torch.bool",
        ),
        (
            {"input_padding_mask": torch.zeros(2, 40, dtype=torch.bool)},
            ValueError,
            r"input_padding_mask has shape \[2, 40\]; it must be \[2, 41\]",
        ),
    ],
)
def test_a_wrong_argument_of_forward_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    made = MSDeformAttn(24, 2, 4)
    with pytest.raises(error, match=f"^{message}"):
        made(**{**inputs(2, dtype=torch.float32), **change})
