"""What a call of an operator becomes in an ONNX model."""

import inspect
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from ..ops._operator import NAMESPACE, Operator, operators

VERSION = 1
"""Of the domain ``deformkit`` in ONNX models."""

FORWARD = [name for name in operators if not name.endswith("_backward")]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For each operator, the function that translates its calls to nodes of the domain ``deformkit``.

    The nodes have the name of the operator. Their inputs are its tensors, and its sizes that may be dynamic, in the
    order of the schema; all other arguments are attributes. A runtime needs kernels for them; :func:`export` adds
    functions that do without. Export the model by :func:`torch.export.export` first, because ``torch.onnx.export``
    replaces the operators of a module by tensor operations.

    Returns:
        A table for the argument ``custom_translation_table`` of :func:`torch.onnx.export`.

    Raises:
        ImportError: the package onnx or onnxscript is missing.

    Example:
        >>> sorted(str(operator) for operator in translation_table())[:2]
        ['deformkit.deform_aggregate.default', 'deformkit.deform_conv.default']
    """
    check_packages()
    return {operators[name].overload: _translator(operators[name]) for name in FORWARD}


def check_packages() -> None:
    """Raise an ImportError, which says how to install them, unless the packages for ONNX are there."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"deformkit.onnx needs {' and '.join(missing)}: pip install deformkit[onnx]")


def standard_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table for convolutions of images as ``DeformConv``."""
    return {operators["deform_conv"].overload: _deform_conv}


def is_input(operator: Operator, position: int) -> bool:
    """Whether this argument is an input of the node: a tensor, or sizes that may be dynamic."""
    return position in operator.tensors or position in sizes_of(operator)


def sizes_of(operator: Operator) -> list[int]:
    """The positions of the arguments that are lists of sizes, which may be dynamic."""
    arguments = operator.schema.split("(", 1)[1].split(", ")
    return [i for i, argument in enumerate(arguments) if argument.startswith("SymInt[]")]


def _translator(operator: Operator) -> Callable[..., Any]:
    def translate(*args: Any) -> Any:
        import onnx_ir as ir

        inputs, attributes = [], {}
        for position, (name, value) in enumerate(zip(operator.arguments, args, strict=True)):
            if position in sizes_of(operator):
                inputs.append(_vector(value))
            elif is_input(operator, position):
                inputs.append(value)
            else:
                attributes[name] = int(value) if isinstance(value, bool) else value
        return _added(ir.node(operator.name, inputs, attributes, domain=NAMESPACE))

    return _with_arguments(translate, operator)


def _with_arguments(translate: Callable[..., Any], operator: Operator) -> Callable[..., Any]:
    """``translate`` with the signature that the exporter asks for."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in operator.arguments]
    translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # the exporter reads it
    translate.__name__ = operator.name
    return translate


def _added(node: Any) -> Any:
    """The output of ``node``, which is added to the model that is being made."""
    from onnxscript import evaluator

    recorder: Any = evaluator.default()
    recorder.nodes.append(node)
    return node.outputs[0]


def _vector(values: Sequence[Any]) -> Any:
    """A tensor of integers, some of which may be values of the model."""
    import onnx_ir as ir
    import onnxscript

    op: Any = onnxscript.opset18
    if not any(isinstance(value, ir.Value) for value in values):
        return op.Constant(value_ints=list(values))
    one = op.Constant(value_ints=[1])
    parts = [op.Reshape(v, one) if isinstance(v, ir.Value) else op.Constant(value_ints=[v]) for v in values]
    return op.Concat(*parts, axis=0)


def _deform_conv(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Any,
    boundary: int,
) -> Any:
    import onnx_ir as ir
    import onnxscript

    op: Any = onnxscript.opset18
    double = input.dtype == ir.DataType.DOUBLE
    wide = ir.DataType.DOUBLE if double else ir.DataType.FLOAT

    def widened(value: Any) -> Any:
        # The runtimes know this node in float32 at least; deformkit, too, computes half precision in float32.
        return value if value is None or value.dtype == wide else op.Cast(value, to=int(wide))

    kernel, channels = [int(k) for k in weight.shape[2:]], int(weight.shape[1])
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": int(input.shape[1]) // channels,
        "offset_group": int(offset.shape[1]) // (2 * kernel[0] * kernel[1]),
    }
    inputs = [widened(value) for value in (input, weight, offset, bias, mask)]
    output = _added(ir.node("DeformConv", inputs, attributes, version=19))
    output.dtype = wide
    return output if input.dtype == wide else op.Cast(output, to=int(input.dtype))
