"""The public functions of deformable convolution under the transforms of PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.ops.deform_conv.cases import Case

FUNCTIONS = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}


@pytest.fixture
def named(axes: int) -> dict[str, Any]:
    case = Case("small", 3, 4, (7, 6, 5)[:axes], 6, (3, 2, 2)[:axes], padding=1, groups=2, offset_groups=2)
    return case.arguments(torch.float64)


def test_names_and_places_of_arguments(axes: int, named: dict[str, Any]) -> None:
    """The arguments are in the order of torchvision; those after the mask are keyword-only."""
    boundary = named.pop("boundary")
    by_place = FUNCTIONS[axes](*named.values())
    assert list(named) == ["input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask"]
    assert torch.equal(by_place, FUNCTIONS[axes](**named, boundary=boundary))
    with pytest.raises(TypeError):
        FUNCTIONS[axes](*named.values(), boundary)


def test_compiles_whole_for_any_batch(axes: int, named: dict[str, Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS[axes], fullgraph=True, dynamic=True, backend="aot_eager")
    for repeat in (3, 5):
        larger = {
            k: torch.cat([named[k]] * repeat) if k in ("input", "offset", "mask") else v for k, v in named.items()
        }
        names = list(larger)
        positions = [i for i, v in enumerate(larger.values()) if isinstance(v, Tensor)]

        def keyed(function: Any, *values: Any, names: list[str] = names) -> Tensor:
            return function(**dict(zip(names, values, strict=True)))

        actual, expected = (
            evaluate(lambda *v, f=f: keyed(f, *v), list(larger.values()), positions, torch.float64)
            for f in (compiled, FUNCTIONS[axes])
        )
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_a_wrong_shape_raises_while_compiling(axes: int, named: dict[str, Any]) -> None:
    torch.compiler.reset()
    named["offset"] = named["offset"][:, 1:]
    with pytest.raises(Exception, match="offset has"):
        torch.compile(FUNCTIONS[axes], backend="eager")(**named)


def test_grad_of_a_compiled_function(axes: int, named: dict[str, Any]) -> None:
    """A transform of a compiled function gives the right result or an error, never silent zeros."""
    torch.compiler.reset()

    def loss(function: Any, offset: Tensor) -> Tensor:
        return function(**{**named, "offset": offset}).square().sum()

    compiled = torch.compile(lambda offset: loss(FUNCTIONS[axes], offset), backend="aot_eager")
    truth = torch.func.grad(lambda offset: loss(FUNCTIONS[axes], offset))(named["offset"])
    assert truth.any()
    assert_close(torch.func.grad(compiled)(named["offset"]), truth)


def test_ensembles_of_weights(axes: int, named: dict[str, Any]) -> None:
    """vmap over the parameters only, as for an ensemble, and over samples without a batch axis."""
    weights = torch.stack([named["weight"], -named["weight"], 2 * named["weight"]])
    function = torch.func.vmap(lambda weight: FUNCTIONS[axes](**{**named, "weight": weight}))
    assert_close(function(weights), torch.stack([FUNCTIONS[axes](**{**named, "weight": w}) for w in weights]))

    def one(input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        batch = {"input": input[None], "offset": offset[None], "mask": mask[None]}
        return FUNCTIONS[axes](**{**named, **batch})[0]

    assert_close(torch.func.vmap(one)(named["input"], named["offset"], named["mask"]), FUNCTIONS[axes](**named))


def test_checkpointing(axes: int, named: dict[str, Any]) -> None:
    offset = named["offset"].clone().requires_grad_()

    def run(offset: Tensor) -> Tensor:
        return FUNCTIONS[axes](**{**named, "offset": offset})

    output = torch.utils.checkpoint.checkpoint(run, offset, use_reentrant=False)
    (again,) = torch.autograd.grad(output.square().sum(), offset)
    (plain,) = torch.autograd.grad(run(offset).square().sum(), offset)
    assert torch.equal(again, plain)
