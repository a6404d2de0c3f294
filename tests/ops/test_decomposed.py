"""``deformkit.export.decomposed``: models in plain operations, for runtimes that do not know deformkit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import Call, public, representatives
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close
from deformkit.export import decomposed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
# What other runtimes lack, or take for another operation.
MISSING = ("bitwise_and", "bitwise_or", "any", "alias", "detach", "lift_fresh_copy", "where.Scalar", "einsum", "grid_sampler")


class Of(nn.Module):
    """The public function of a call, as a function of its tensors."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.function, named = public(call)
        self.names = [name for name, value in named.items() if isinstance(value, Tensor)]
        self.rest = {name: value for name, value in named.items() if name not in self.names}
        self.values = tuple(named[name] for name in self.names)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(**dict(zip(self.names, values, strict=True)), **self.rest)


def exported(model: Of, dynamic: bool = False, **options: Any) -> torch.export.ExportedProgram:
    if dynamic:
        auto = tuple({axis: torch.export.Dim.AUTO for axis in range(value.dim())} for value in model.values)
        options["dynamic_shapes"] = (auto,)
    with torch.no_grad(), decomposed():
        return torch.export.export(model.eval(), model.values, **options)


def check_plain(program: torch.export.ExportedProgram, most_axes: int) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten" and not any(name in str(node.target) for name in MISSING), node.target
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                assert not isinstance(value, Tensor) or value.dim() <= most_axes, (node, value.shape)
    assert all(value.numel() <= 64 for value in program.constants.values() if isinstance(value, Tensor))


def check(call: Call, program: torch.export.ExportedProgram, model: Of) -> None:
    expected = model(*model.values)
    check_plain(program, max(5, expected.dim()))
    truth = call.operator.reference(*call.arguments(torch.float64))
    assert_close(program.module()(*model.values).reshape(truth.shape), truth, expected.reshape(truth.shape))


@pytest.mark.parametrize("call", [call for call in representatives() if not str(call).endswith("1d")], ids=str)
def test_every_operator_is_plain(call: Call) -> None:
    model = Of(call)
    check(call, exported(model), model)


@pytest.mark.parametrize("call", [call for call in representatives() if str(call).endswith("1d")], ids=str)
def test_every_operator_is_plain_with_dynamic_sizes(call: Call) -> None:
    model = Of(call)
    check(call, exported(model, dynamic=True), model)
