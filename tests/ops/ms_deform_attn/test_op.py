"""The public function of multi-scale deformable attention under the transforms of PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops.ms_deform_attn.cases import Case

TENSORS = ("value", "sampling_locations", "attention_weights")


@pytest.fixture
def case(axes: int) -> Case:
    return Case("small", 2, ((7, 6, 5)[:axes], (3, 2, 4)[:axes]), 5, 3, 4, (3, 3))


def call(case: Case, **changes: Any) -> Callable[..., Tensor]:
    """The function of its three tensors, with locations as [B, Q, H, P, N]."""
    options = {"num_points": case.points, "mode": case.mode, **changes}
    shapes = options.pop("spatial_shapes", case.sizes)
    return lambda value, locations, weights: dk.ms_deform_attn(value, shapes, locations, weights, **options)


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    named = case.arguments(dtype)
    return [named[name] for name in TENSORS]


def test_names_and_places_of_arguments(case: Case) -> None:
    value, locations, weights = tensors(case)
    by_name = dk.ms_deform_attn(
        value=value,
        spatial_shapes=case.sizes,
        sampling_locations=locations,
        attention_weights=weights,
        num_points=[3, 3],
        mode="linear",
    )
    assert_equal(dk.ms_deform_attn(value, case.sizes, locations, weights, num_points=[3, 3]), by_name)
    with pytest.raises(TypeError):
        dk.ms_deform_attn(value, case.sizes, locations, weights, [3, 3])


def test_both_forms_of_locations_and_every_form_of_num_points(case: Case) -> None:
    value, locations, weights = tensors(case)
    expected = call(case)(value, locations, weights)
    levels = dk.ms_deform_attn(value, case.sizes, locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3)))
    assert_equal(levels, expected)
    for points in (3, [3, 3], (3, 3), torch.Size([3, 3])):
        assert_equal(call(case, num_points=points)(value, locations, weights), expected)


def test_one_level_needs_no_num_points(axes: int) -> None:
    case = Case("one level", 1, ((4,) * axes,), 2, 1, 3, (5,))
    value, locations, weights = tensors(case)
    flat = dk.ms_deform_attn(value, case.sizes, locations, weights)
    assert_equal(flat, dk.ms_deform_attn(value, case.sizes, locations.unsqueeze(3), weights.unsqueeze(3)))


def test_every_form_of_spatial_shapes(case: Case) -> None:
    given = tensors(case)
    expected = call(case)(*given)
    forms: list[Any] = [list(case.sizes), [list(size) for size in case.sizes], [torch.Size(s) for s in case.sizes]]
    forms += [torch.tensor(case.sizes, dtype=d) for d in (torch.int64, torch.int32, torch.int16, torch.uint8)]
    forms += [[tuple(torch.tensor(size)) for size in case.sizes]]
    if case.axes == 1:
        forms += [[7, 3], (7, 3), torch.tensor([7, 3]), [7, (3,)]]
    for form in forms:
        assert_equal(call(case, spatial_shapes=form)(*given), expected)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("levels", [False, True], ids=["flat", "levels"])
def test_compiles_whole_for_any_batch_and_any_queries(case: Case, levels: bool, mode: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        if not levels:
            return call(case, mode=mode)(value, locations, weights)
        locations, weights = locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3))
        return dk.ms_deform_attn(value, list(case.sizes), locations, weights, mode=mode)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for repeat, times in ((7, 3), (3, 2)):
        given = [torch.cat([t] * repeat) for t in tensors(case)]
        given[1:] = [torch.cat([t] * times, 1) for t in given[1:]]
        actual, expected = (evaluate(f, given, range(3), torch.float64) for f in (compiled, function))
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
    assert counter.frame_count == 1


def test_a_wrong_shape_raises_while_compiling(case: Case) -> None:
    torch.compiler.reset()
    value, *rest = tensors(case)
    with pytest.raises(Exception, match="spatial_shapes adds up to"):
        torch.compile(call(case), backend="eager")(value[:, 1:], *rest)


def test_exports_with_levels_of_feature_maps(case: Case) -> None:
    """Sizes that come from the shapes of feature maps."""

    class Pyramid(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            maps = [first, second]
            value = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1).unflatten(-1, (3, 4))
            return dk.ms_deform_attn(value, [m.shape[2:] for m in maps], locations, weights, num_points=3)

    _, locations, weights = tensors(case, torch.float32)
    inputs = (*(torch.randn(2, 12, *size) for size in case.sizes), locations, weights)
    program = torch.export.export(Pyramid(), inputs)
    assert sum("ms_deform_attn" in str(node.target) for node in program.graph.nodes) == 1
    assert_equal(program.module()(*inputs), Pyramid()(*inputs))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_takes_values_and_weights_of_any_dtype(case: Case, half: torch.dtype) -> None:
    """Under autocast a projection gives half-precision values, and a softmax gives float32 weights."""
    value, locations, weights = tensors(case, torch.float32)
    expected = call(case)(value.to(half), locations, weights.to(half))
    with torch.autocast("cpu", dtype=half):
        for one in (value, value.to(half)):
            for other in (weights, weights.to(half)):
                assert_equal(call(case)(one, locations, other), expected)
        with pytest.raises(TypeError, match="sampling_locations has dtype"):
            call(case)(value, locations.to(half), weights)


def test_vmap_over_queries_of_one_value(case: Case) -> None:
    value, locations, weights = tensors(case)
    several = torch.stack([locations, locations.flip(1)]), torch.stack([weights, weights.flip(1)])
    actual = torch.func.vmap(call(case), in_dims=(None, 0, 0))(value, *several)
    truth = torch.stack([call(case)(value, *(t[n] for t in several)) for n in range(2)])
    assert_close(actual, truth)
