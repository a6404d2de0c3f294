"""A patched model exports to ONNX as it did before it was patched."""

from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from patched import LAYERS, SHAPES, attention
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Warnings of the exporters about their own code.
    pytest.mark.filterwarnings("ignore:(?s).*(ONNX|onnx|Constant folding|constants in the trace)"),
]


class OfTensors(nn.Module):
    """A layer that takes only tensors, as an exporter requires, and returns one."""

    def __init__(self, layer: nn.Module, names: list[str], rest: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.names, self.rest = layer, names, rest

    def forward(self, *values: Tensor) -> Tensor:
        output = self.layer(**dict(zip(self.names, values, strict=True)), **self.rest)
        return output if isinstance(output, Tensor) else output[0]


def check(layer: nn.Module, arguments: dict[str, Any], dynamo: bool, path: Path) -> None:
    """The patched layer exports to a graph of standard operators with the same results."""
    if dynamo:
        pytest.importorskip("onnxscript")
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
    rest = {name: value for name, value in arguments.items() if name not in names}
    model, values = OfTensors(layer, names, rest).eval(), [arguments[name] for name in names]
    with torch.no_grad():
        expected = model(*values)
        dk.patch(model)
        try:
            torch.onnx.export(model, tuple(values), path, dynamo=dynamo, opset_version=18, verbose=False)
        finally:
            dk.unpatch(model)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path)
    feeds = {node.name: value.numpy() for node, value in zip(session.get_inputs(), values, strict=True)}
    (answer,) = session.run(None, feeds)
    assert_close(torch.from_numpy(answer), expected.double(), expected)


@pytest.mark.parametrize("model_type", LAYERS)
@pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
def test_layers_of_transformers(model_type: str, dynamo: bool, tmp_path: Path) -> None:
    if dynamo and model_type in ("rt_detr_v2", "d_fine"):
        pytest.skip("a check of these layers themselves is no operator of ONNX, patched or not")
    check(*attention(model_type), dynamo, tmp_path / "model.onnx")


@pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
def test_ultralytics(monkeypatch: pytest.MonkeyPatch, dynamo: bool, tmp_path: Path) -> None:
    module = stand_ins.install(monkeypatch, "ultralytics.nn.modules.utils", "ultralytics.nn.modules.transformer")
    arguments = {
        "value": torch.randn(2, 42, 2, 4),
        "shapes": SHAPES,
        "locations": torch.rand(2, 7, 2, 6, 2) * 1.4 - 0.2,
        "weights": torch.rand(2, 7, 2, 6),
    }
    check(module.MSDeformAttn(), arguments, dynamo, tmp_path / "model.onnx")
