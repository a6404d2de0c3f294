"""The ONNX project's own tests of ``DeformConv``, by its node, our function, our library and our rule for OpenVINO."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nodes
import numpy as np
import pytest
import torch
from rooms import needs_kernels
from torch import Tensor, nn

import deformkit as dk
from deformkit.ops._operator import operators

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
node_tests = pytest.importorskip("onnx.backend.test.case.node")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@cache
def cases() -> dict[str, Any]:
    # onnx computes the tests of all operators, of which some overflow on purpose.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in node_tests.collect_testcases("DeformConv")}


class Convolution(nn.Module):
    """The convolution of a node, with its inputs in their order."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.given = [bool(name) for name in node.input] + [False] * (5 - len(node.input))
        known = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        pads = known.get("pads", [0, 0, 0, 0])
        assert pads[:2] == pads[2:]
        self.stride, self.padding = known.get("strides", [1, 1]), pads[:2]
        self.dilation = known.get("dilations", [1, 1])

    def ordered(self, *values: Tensor) -> list[Tensor | None]:
        """Those that are given, and None for the others."""
        left = iter(values)
        return [next(left) if given else None for given in self.given]

    def forward(self, *values: Tensor) -> Tensor:
        x, w, offset, b, mask = self.ordered(*values)
        assert x is not None and w is not None and offset is not None
        return dk.deform_conv2d(x, offset, w, b, self.stride, self.padding, self.dilation, mask=mask)


def by_runtime(case: Any, values: list[Any], path: Path) -> Any:
    session = onnxruntime.InferenceSession(case.model.SerializeToString())
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], values, strict=True)))[0]


def by_function(case: Any, values: list[Any], path: Path) -> Any:
    (node,) = case.model.graph.node
    tensors = tuple(map(torch.from_numpy, values))
    dk.onnx.export(Convolution(node).eval(), tensors, path)
    session = onnxruntime.InferenceSession(path)
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], values, strict=True)))[0]


def by_library(case: Any, values: list[Any], path: Path) -> Any:
    (node,) = case.model.graph.node
    module = Convolution(node)
    x, w, offset, b, mask = module.ordered(*map(torch.from_numpy, values))
    args = [x, offset, w, b, module.stride, module.padding, module.dilation, mask, 0]
    return nodes.result(operators["deform_conv"], args).numpy()


def by_openvino(case: Any, values: list[Any], path: Path) -> Any:
    openvino = pytest.importorskip("openvino")
    onnx.save(case.model, path)
    model = openvino.compile_model(dk.openvino.convert(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model(values)[0]


WAYS = [by_runtime, by_function, pytest.param(by_library, marks=needs_kernels), by_openvino]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_node_tests(way: Callable[..., Any], tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    found, worst = cases(), 0.0
    assert {"test_basic_deform_conv_with_padding", "test_deform_conv_with_multiple_offset_groups"} <= found.keys()
    for case in found.values():
        ((values, (expected,)),) = case.data_sets
        actual = way(case, values, tmp_path / f"{case.name}.onnx")
        np.testing.assert_allclose(actual, expected, case.rtol, case.atol, err_msg=case.name)
        worst = max(worst, float(np.abs(actual - expected).max()))
    record_property("worst difference", worst)
