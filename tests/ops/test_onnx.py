"""Export to ONNX: the operators become tensor operations that every runtime supports, with the same results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import Call, also, public
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Warnings of the exporters about their own code.
    pytest.mark.filterwarnings("ignore:(?s).*(ONNX|onnx|Constant folding|constants in the trace|axis name)"),
]


class Model(nn.Module):
    def __init__(self, function: Any, names: list[str], rest: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.names, self.rest = function, names, rest

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(**dict(zip(self.names, values, strict=True)), **self.rest)


def answer(path: Path, values: list[Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    feeds = {node.name: value.numpy() for node, value in zip(session.get_inputs(), values, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.slow
@also("dynamo", "trace", "dynamo")
def test_onnxruntime_computes_the_same(call: Call, dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    function, named = public(call)
    names = [name for name, value in named.items() if isinstance(value, Tensor)]
    model = Model(function, names, {name: value for name, value in named.items() if name not in names})
    values = [named[name] for name in names]
    path = tmp_path / "model.onnx"
    torch.onnx.export(model.eval(), tuple(values), path, dynamo=dynamo, opset_version=18, verbose=False)
    assert_close(answer(path, values), call.operator.reference(*call.arguments(torch.float64)), model(*values))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
def test_any_batch_and_size(dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    weight, path = torch.randn(5, 4, 3, 3), tmp_path / "model.onnx"
    model = Model(dk.deform_conv2d, ["input", "offset"], {"weight": weight, "padding": 1}).eval()

    def drawn(batch: int, height: int, width: int) -> list[Tensor]:
        return [torch.randn(batch, 4, height, width), torch.randn(batch, 18, height, width)]

    axes = {0: "batch", 2: "height", 3: "width"}
    names: dict[str, Any] = {"input_names": ["input", "offset"]}
    if dynamo:
        names["dynamic_shapes"] = ((axes, axes),)
    else:
        names["dynamic_axes"] = {"input": axes, "offset": axes}
    torch.onnx.export(model, tuple(drawn(2, 7, 9)), path, dynamo=dynamo, opset_version=18, verbose=False, **names)
    for sizes in ((2, 7, 9), (3, 12, 5)):
        values = drawn(*sizes)
        truth = dk.deform_conv2d(*(v.double() for v in values), weight.double(), padding=1)
        assert_close(answer(path, values), truth, model(*values))
