"""The public function of deformable aggregation under the transforms of PyTorch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.ops.deform_aggregate.cases import Case


@pytest.fixture
def named(axes: int) -> dict[str, Any]:
    case = Case("small", 3, (7, 6, 5)[:axes], 2, 4, (3, 1, 3)[:axes], padding=1, offset_scale=0.5, remove_center=True)
    return case.arguments(torch.float64)


def test_names_and_places_of_arguments(named: dict[str, Any]) -> None:
    """The arguments are in the order of a convolution; those after the dilation are keyword-only."""
    rest = {name: named.pop(name) for name in ("offset_scale", "remove_center", "boundary")}
    assert list(named) == ["value", "offset", "weight", "kernel_size", "stride", "padding", "dilation"]
    assert torch.equal(dk.deform_aggregate(*named.values(), **rest), dk.deform_aggregate(**named, **rest))
    with pytest.raises(TypeError):
        dk.deform_aggregate(*named.values(), 0.5)


def test_compiles_whole_for_any_batch(named: dict[str, Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(dk.deform_aggregate, fullgraph=True, dynamic=True, backend="aot_eager")

    def keyed(function: Any, *values: Any) -> Tensor:
        return function(**dict(zip(named, values, strict=True)))

    for repeat in (3, 5):
        larger = {k: torch.cat([v] * repeat) if isinstance(v, Tensor) else v for k, v in named.items()}

        actual, expected = (
            evaluate(partial(keyed, f), list(larger.values()), [0, 1, 2], torch.float64)
            for f in (compiled, dk.deform_aggregate)
        )
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_compiles_for_any_scale(named: dict[str, Any]) -> None:
    """The compiler turns the second different float into a symbol."""
    torch.compiler.reset()
    compiled = torch.compile(dk.deform_aggregate, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 0.75, 1.5, -2.0, 3):
        changed = {**named, "offset_scale": scale}
        assert_close(compiled(**changed), dk.deform_aggregate(**changed))
    with pytest.raises(Exception, match="offset_scale is"):
        compiled(**{**named, "offset_scale": float("nan")})


def test_a_wrong_shape_raises_while_compiling(named: dict[str, Any]) -> None:
    torch.compiler.reset()
    named["offset"] = named["offset"][:, 1:]
    with pytest.raises(Exception, match="offset has"):
        torch.compile(dk.deform_aggregate, backend="eager")(**named)


def test_grad_of_a_compiled_function(named: dict[str, Any]) -> None:
    """A transform of a compiled function gives the right result or an error, never silent zeros."""
    torch.compiler.reset()

    def loss(offset: Tensor) -> Tensor:
        return dk.deform_aggregate(**{**named, "offset": offset}).square().sum()

    truth = torch.func.grad(loss)(named["offset"])
    assert truth.any()
    assert_close(torch.func.grad(torch.compile(loss, backend="aot_eager"))(named["offset"]), truth)


def test_ensembles_of_weights(named: dict[str, Any]) -> None:
    """vmap over the weights only, as for an ensemble, and over samples without a batch axis."""
    weights = torch.stack([named["weight"], -named["weight"], 2 * named["weight"]])
    found = torch.func.vmap(lambda weight: dk.deform_aggregate(**{**named, "weight": weight}))(weights)
    assert_close(found, torch.stack([dk.deform_aggregate(**{**named, "weight": w}) for w in weights]))

    def one(*batch: Tensor) -> Tensor:
        values = zip(("value", "offset", "weight"), batch, strict=True)
        return dk.deform_aggregate(**{**named, **{name: v[None] for name, v in values}})[0]

    by_sample = torch.func.vmap(one)(named["value"], named["offset"], named["weight"])
    assert_close(by_sample, dk.deform_aggregate(**named))


def test_checkpointing(named: dict[str, Any]) -> None:
    offset = named["offset"].clone().requires_grad_()

    def run(offset: Tensor) -> Tensor:
        return dk.deform_aggregate(**{**named, "offset": offset})

    output = torch.utils.checkpoint.checkpoint(run, offset, use_reentrant=False)
    (again,) = torch.autograd.grad(output.square().sum(), offset)
    (plain,) = torch.autograd.grad(run(offset).square().sum(), offset)
    assert torch.equal(again, plain)
