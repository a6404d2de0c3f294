"""The public function of deformable RoI pooling under the transforms of PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.ops.deform_roi_pool.cases import Case


@pytest.fixture
def case(axes: int) -> Case:
    return Case("small", 3, 4, (7, 6, 5)[:axes], 5, (3, 2, 2)[:axes], spatial_scale=0.5)


@pytest.fixture
def named(case: Case) -> dict[str, Any]:
    return case.arguments(torch.float64)


def test_names_and_places_of_arguments(named: dict[str, Any]) -> None:
    """The arguments are in the order of mmcv, and then our own; those after the offset are keyword-only."""
    tensors = [named.pop(name) for name in ("input", "rois", "offset")]
    assert list(named) == ["output_size", "spatial_scale", "sampling_ratio", "gamma", "group_size"]
    dk.deform_roi_pool(*tensors, **named)
    with pytest.raises(TypeError):
        dk.deform_roi_pool(*tensors, *named.values())


def test_defaults(named: dict[str, Any]) -> None:
    tensors = {name: named[name] for name in ("input", "rois", "offset")}
    expected = dk.deform_roi_pool(
        **tensors, output_size=named["output_size"], spatial_scale=1.0, sampling_ratio=0, gamma=0.1
    )
    assert torch.equal(dk.deform_roi_pool(**tensors, output_size=named["output_size"]), expected)
    tensors["offset"] = None
    expected = dk.deform_roi_pool(**tensors, output_size=2)
    assert torch.equal(dk.deform_roi_pool(named["input"], named["rois"], output_size=2), expected)


@pytest.mark.parametrize("ratio", [0, 2], ids=["adaptive", "fixed"])
def test_compiles_whole_for_any_number_of_rois(case: Case, ratio: int) -> None:
    torch.compiler.reset()
    compiled = torch.compile(dk.deform_roi_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    for rois in (7, 11):
        named = {**Case(**{**case.__dict__, "rois": rois}).arguments(torch.float64), "sampling_ratio": ratio}
        names, values = list(named), list(named.values())

        def keyed(function: Any, *values: Any, names: list[str] = names) -> Tensor:
            return function(**dict(zip(names, values, strict=True)))

        actual, expected = (
            evaluate(lambda *v, f=f: keyed(f, *v), values, [0, 2], torch.float64)
            for f in (compiled, dk.deform_roi_pool)
        )
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_a_wrong_shape_raises_while_compiling(named: dict[str, Any]) -> None:
    torch.compiler.reset()
    named["offset"] = named["offset"][:, 1:]
    with pytest.raises(Exception, match="offset has"):
        torch.compile(dk.deform_roi_pool, backend="eager")(**named)


def test_rois_have_no_gradient(named: dict[str, Any]) -> None:
    rois = named["rois"].requires_grad_()
    with pytest.warns(UserWarning, match=r"rois requires a gradient and gets none; pass rois\.detach\(\)") as caught:
        for _ in range(2):
            output = dk.deform_roi_pool(**{**named, "input": named["input"].requires_grad_()})
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.autograd.grad(output.sum(), rois, allow_unused=True) == (None,)
    reference = dk.reference.deform_roi_pool(*named.values())
    assert torch.autograd.grad(reference.sum(), rois, allow_unused=True) == (None,)

    def loss(rois: Tensor) -> Tensor:
        return dk.deform_roi_pool(**{**named, "rois": rois}).sum()

    assert not torch.func.grad(loss)(rois.detach()).any()


def test_transforms_whose_values_cannot_be_read(case: Case, named: dict[str, Any]) -> None:
    """Batch indices are checked if they can be read; transforms and fake tensors pass."""
    several = [case.arguments(torch.float64, seed=seed) for seed in range(3)]
    stacked = {name: torch.stack([s[name] for s in several]) for name in ("rois", "offset")}

    def pool(rois: Tensor, offset: Tensor) -> Tensor:
        return dk.deform_roi_pool(**{**named, "rois": rois, "offset": offset})

    truth = torch.stack([pool(s["rois"], s["offset"]) for s in several])
    assert_close(torch.func.vmap(pool)(stacked["rois"], stacked["offset"]), truth)
    truth = torch.stack([pool(s["rois"], named["offset"]) for s in several])
    assert_close(torch.func.vmap(pool, in_dims=(0, None))(stacked["rois"], named["offset"]), truth)
    tangent = torch.func.jvp(lambda offset: pool(named["rois"], offset), (named["offset"],), (named["offset"],))[1]
    assert tangent.any()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in named.items()}
        assert dk.deform_roi_pool(**fake).shape == (5, 4, *case.output_size)


def test_export_with_any_number_of_rois(case: Case) -> None:
    class Pool(torch.nn.Module):
        def forward(self, input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
            return dk.deform_roi_pool(input, rois, offset, output_size=case.output_size, spatial_scale=0.5)

    def tensors(rois: int) -> tuple[Tensor, ...]:
        return tuple(Case(**{**case.__dict__, "rois": rois}).arguments().values())[:3]

    count = torch.export.Dim("count", min=0, max=1000)
    program = torch.export.export(Pool(), tensors(5), dynamic_shapes=({}, {0: count}, {0: count}))
    for rois in (1, 8):
        assert torch.equal(program.module()(*tensors(rois)), Pool()(*tensors(rois)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(case: Case, half: torch.dtype) -> None:
    """The input is cast; corners and offsets are not, because half precision would round them."""
    named = case.arguments()
    with torch.autocast("cpu", half):
        output = dk.deform_roi_pool(**named)
    assert output.dtype == half
    assert torch.equal(output, dk.deform_roi_pool(**{**named, "input": named["input"].to(half)}))


def test_checkpointing(named: dict[str, Any]) -> None:
    offset = named["offset"].clone().requires_grad_()

    def run(offset: Tensor) -> Tensor:
        return dk.deform_roi_pool(**{**named, "offset": offset})

    output = torch.utils.checkpoint.checkpoint(run, offset, use_reentrant=False)
    (again,) = torch.autograd.grad(output.square().sum(), offset)
    (plain,) = torch.autograd.grad(run(offset).square().sum(), offset)
    assert torch.equal(again, plain)
