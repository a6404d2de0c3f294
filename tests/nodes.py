"""ONNX models of one node of the domain ``deformkit``, and their results in ONNX Runtime with deformkit's library."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit.onnx._translate import is_input
from deformkit.ops._operator import Operator

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

DTYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
    torch.complex64: onnx.TensorProto.COMPLEX64,
}


def as_stored(args: Sequence[Any]) -> list[Any]:
    """The arguments with numbers as an attribute holds them, in float32."""
    return [float(np.float32(value)) if isinstance(value, float) else value for value in args]


def inputs_of(operator: Operator, args: Sequence[Any]) -> dict[str, Tensor | None]:
    """The inputs of the node for a call of ``operator``."""
    return {
        name: torch.tensor(value, dtype=torch.int64) if isinstance(value, list | tuple) else value
        for position, (name, value) in enumerate(zip(operator.arguments, args, strict=True))
        if is_input(operator, position)
    }


def attributes_of(operator: Operator, args: Sequence[Any]) -> dict[str, Any]:
    """The attributes of the node for a call of ``operator``."""
    return {
        name: int(value) if isinstance(value, bool) else value
        for position, (name, value) in enumerate(zip(operator.arguments, args, strict=True))
        if not is_input(operator, position)
    }


def model(name: str, inputs: Mapping[str, Tensor | None], attributes: Mapping[str, Any], result: torch.dtype) -> bytes:
    """A model whose inputs may have any size; NumPy has no bfloat16, so that these are float32 outside the node."""
    given = {key: value for key, value in inputs.items() if value is not None}
    narrow = {key for key, value in given.items() if value.dtype == torch.bfloat16}
    names = [f"{key}_narrow" if key in narrow else key if key in given else "" for key in inputs]
    while names and not names[-1]:
        names.pop()
    nodes = [
        onnx.helper.make_node("Cast", [key], [f"{key}_narrow"], to=onnx.TensorProto.BFLOAT16) for key in sorted(narrow)
    ]
    node = onnx.helper.make_node(name, names, ["found"], domain="deformkit")
    for key, value in attributes.items():
        empty = isinstance(value, list | tuple) and not value
        node.attribute.append(
            onnx.helper.make_attribute(key, value, attr_type=onnx.AttributeProto.INTS if empty else None)
        )
    wide = onnx.TensorProto.FLOAT if result == torch.bfloat16 else DTYPES[result]
    nodes += [node, onnx.helper.make_node("Cast", ["found"], ["output"], to=wide)]
    graph = onnx.helper.make_graph(
        nodes,
        "one",
        [
            onnx.helper.make_tensor_value_info(key, DTYPES[fed(value).dtype], [None] * value.dim())
            for key, value in given.items()
        ],
        [onnx.helper.make_tensor_value_info("output", wide, None)],
    )
    opsets = [onnx.helper.make_opsetid("", 19), onnx.helper.make_opsetid("deformkit", 1)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def fed(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def run(model: bytes, inputs: Mapping[str, Tensor | None], threads: int = 1, library: str | None = None) -> Tensor:
    """The output of the model; the runtime's exceptions pass through."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(library or dk.onnx.library())
    session = onnxruntime.InferenceSession(model, options)
    feeds = {key: fed(value).numpy() for key, value in inputs.items() if value is not None}
    return torch.from_numpy(session.run(None, feeds)[0])


def result(operator: Operator, args: Sequence[Any], threads: int = 1, library: str | None = None) -> Tensor:
    """What the node computes for the arguments of a call, in the dtype of the operator's result."""
    inputs, dtype = inputs_of(operator, args), args[0].dtype
    made = model(operator.name, inputs, attributes_of(operator, args), dtype)
    return run(made, inputs, threads, library).to(dtype)
