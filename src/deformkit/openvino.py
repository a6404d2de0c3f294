"""Models in OpenVINO. Needs ``pip install deformkit[openvino]``."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from operator import getitem
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from .ops._form import exported_as, is_standard
from .ops._operator import NAMESPACE, Operator, operators

_CURE = "deformkit.openvino.convert() converts it by standard operations"
# The name that a convolution has while the functions of all other nodes are inlined.
_KEPT = "deform_conv2d"


def extensions() -> list[Any]:
    """The conversion rules for models with operators of deformkit, for OpenVINO's frontends of ONNX and PyTorch.

    With them, two-dimensional convolutions with ``boundary="zeros"`` become ``DeformableConvolution`` of OpenVINO, so
    that it takes

    - ONNX files with nodes ``DeformConv``, for which it has no rule itself,
    - ONNX files of :func:`deformkit.onnx.export` that contain no other operator of deformkit,
    - programs of :func:`torch.export.export` that contain no other operator of deformkit.

    OpenVINO has no operation for the others; :func:`convert` also takes models with these.

    Returns:
        A list for ``core.add_extension(...)`` or ``openvino.convert_model(..., extension=...)``.

    Raises:
        ImportError: the package openvino is missing.

    Example:
        >>> from deformkit import openvino
        >>> rules = openvino.extensions()  # doctest: +SKIP
        >>> model = openvino.convert_model("detector.onnx", extension=rules)  # doctest: +SKIP
    """
    _check_package("openvino")
    from openvino.frontend import onnx as of_onnx
    from openvino.frontend import pytorch as of_torch

    found = [of_onnx.ConversionExtension("DeformConv", "", _deform_conv_of_onnx)]
    for operator in _forward():
        name = operator.name
        rules = (_node, _call) if name == "deform_conv" else (partial(_refused, name),) * 2
        found.append(of_onnx.ConversionExtension(name, NAMESPACE, rules[0]))
        found.append(of_torch.ConversionExtension(f"{NAMESPACE}.{name}.default", rules[1]))
    return found


def convert(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    args: Sequence[Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Any:
    """Convert a model with operators of deformkit to a model of OpenVINO.

    Two-dimensional convolutions with ``boundary="zeros"`` become ``DeformableConvolution`` of OpenVINO; all other
    operators of deformkit become standard operations.

    Args:
        model: a module in eval mode, a program of :func:`torch.export.export`, or the path of an ONNX file.
        args: example arguments of a module, a tuple.
        kwargs: further example arguments of a module, by name.
        dynamic_shapes: of a module, as for :func:`torch.export.export`; by default all sizes are fixed.

    Returns:
        An ``openvino.Model``, for ``openvino.compile_model`` or ``openvino.save_model``.

    Raises:
        ImportError: the package openvino is missing, or onnx or onnxscript, which modules and files need.
        TypeError: ``args`` is missing for a module, or given for a program or a file.

    Example:
        >>> import torch, deformkit
        >>> layer = deformkit.nn.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> model = convert(layer, (torch.randn(1, 3, 8, 8),))  # doctest: +SKIP
    """
    rules = extensions()
    if isinstance(model, nn.Module):
        if args is None:
            raise TypeError("args is None; a module needs example arguments")
        return _convert_module(model, args, kwargs, dynamic_shapes, rules)
    if args is not None or kwargs is not None or dynamic_shapes is not None:
        raise TypeError("args, kwargs and dynamic_shapes are for modules; a program or a file has its own shapes")
    if isinstance(model, ExportedProgram):
        return _convert_program(model, rules)
    return _convert_file(os.fspath(model), rules)


def _convert_module(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any, rules: list[Any]) -> Any:
    # OpenVINO follows computations with sizes in files of ONNX, and some of them alone in programs of PyTorch.
    from .onnx import export

    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        export(model, args, path, form="standard", kwargs=kwargs, dynamic_shapes=dynamic_shapes)
        return _convert_file(path, rules)


def _convert_program(program: ExportedProgram, rules: list[Any]) -> Any:
    import openvino

    with torch.no_grad(), exported_as("plain"):
        program = program.run_decompositions({o.overload: partial(_decomposed, o) for o in _forward()})
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=operators["deform_conv"].overload):
        _state_channels(graph, node)
    return openvino.convert_model(program, extension=rules)


def _decomposed(operator: Operator, *args: Any) -> Any:
    if operator.name == "deform_conv" and is_standard("deform_conv", args[0].dim() - 2, args[-1]):
        # The rule needs these sizes.
        if all(isinstance(size, int) for size in (args[0].shape[1], args[1].shape[1], *args[2].shape)):
            return NotImplemented
    return operator.reference(*args)


def _state_channels(graph: Graph, node: Node) -> None:
    """Make the numbers of channels and taps of a convolution known to OpenVINO, which knows no sizes of a program."""
    aten = torch.ops.aten
    old: Any = node.args[:3]
    with graph.inserting_before(node):
        # A split into one part fixes the size of an axis.
        parts = [graph.call_function(aten.split_with_sizes.default, (v, [v.meta["val"].shape[1]], 1)) for v in old[:2]]
        new = [graph.call_function(getitem, (part, 0)) for part in parts]
        new.append(graph.call_function(aten.view.default, (old[2], list(old[2].meta["val"].shape))))
    for part, value in zip(parts, old, strict=False):
        part.meta["val"] = [value.meta["val"]]
    for stated, value in zip(new, old, strict=True):
        stated.meta["val"] = value.meta["val"]
    node.args = (*new, *node.args[3:])


def _convert_file(path: str, rules: list[Any]) -> Any:
    _check_package("onnx")
    import onnx.inliner
    import openvino

    model = onnx.load(path)
    for node in _nodes(model.graph):
        if node.domain == NAMESPACE and _has_rule(node):
            node.op_type = _KEPT
    # OpenVINO knows no functions with overloads.
    model = onnx.inliner.inline_local_functions(model)
    for node in _nodes(model.graph):
        if node.domain == NAMESPACE and node.op_type == _KEPT:
            node.op_type = "deform_conv"
    core = openvino.Core()
    core.add_extension(rules)
    return core.read_model(model.SerializeToString())


def _forward() -> list[Operator]:
    return [operator for name, operator in operators.items() if not name.endswith("_backward")]


def _check_package(name: str) -> None:
    if find_spec(name) is None:
        raise ImportError(f"deformkit.openvino needs {name}: pip install deformkit[openvino]")


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph of ONNX, including those of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _has_rule(node: Any) -> bool:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    return "stride" in attributes and is_standard(
        node.op_type, len(attributes["stride"].ints), attributes["boundary"].i
    )


def _refused(name: str, node: Any) -> Any:
    raise ValueError(f"OpenVINO has no operation for {NAMESPACE}.{name}; {_CURE}")


def _deform_conv_of_onnx(node: Any) -> list[Any]:
    """The rule for the node ``DeformConv`` of ONNX."""
    input, weight, offset, *rest = _inputs(node)
    bias, mask = [*rest, None, None][:2]
    pads = node.get_attribute("pads", [0, 0, 0, 0])
    if len(pads) != 4:
        raise ValueError(f"DeformConv has pads {pads}; OpenVINO computes it in two dimensions alone")
    groups, offset_groups = node.get_attribute("group", 1), node.get_attribute("offset_group", 1)
    strides, dilations = node.get_attribute("strides", [1, 1]), node.get_attribute("dilations", [1, 1])
    return _convolution(input, offset, weight, bias, mask, strides, pads, dilations, groups, offset_groups)


def _node(node: Any) -> list[Any]:
    """The rule for the node ``deformkit.deform_conv`` of ONNX."""
    sizes = [node.get_attribute(name) for name in ("stride", "padding", "dilation")]
    input, offset, weight, bias, mask = [*_inputs(node), None, None][:5]
    return _deform_conv(input, offset, weight, bias, mask, sizes, node.get_attribute("boundary"))


def _call(node: Any) -> list[Any]:
    """The rule for calls of the operator in a program of PyTorch."""
    input, offset, weight, bias, *sizes, mask, boundary = _inputs(node)
    values = [[int(v) for v in size.get_node().get_data()] for size in sizes]
    boundary = int(boundary.get_node().get_data())
    return _deform_conv(input, offset, weight, bias, mask, values, boundary)


def _deform_conv(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    sizes: list[list[int]],
    boundary: int,
) -> list[Any]:
    stride, padding, dilation = sizes
    if not is_standard("deform_conv", len(stride), boundary):
        raise ValueError(
            f"OpenVINO has no operation for deform_conv with {len(stride)} axes and boundary {boundary}; {_CURE}"
        )
    channels, per_group, *kernel = (_fixed(*place) for place in ((input, 1), (weight, 1), (weight, 2), (weight, 3)))
    offset_groups = _fixed(offset, 1) // (2 * kernel[0] * kernel[1])
    pads = [*padding, *padding]
    return _convolution(input, offset, weight, bias, mask, stride, pads, dilation, channels // per_group, offset_groups)


def _convolution(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    strides: list[int],
    pads: list[int],
    dilations: list[int],
    groups: int,
    offset_groups: int,
) -> list[Any]:
    from openvino import Type, opset8

    kind = input.get_element_type()
    wide = kind if kind == Type.f64 else Type.f32

    def widened(value: Any) -> Any:
        # deformkit, too, computes half precision in float32.
        return value if value is None or value.get_element_type() == wide else opset8.convert(value, wide).output(0)

    inputs = [widened(value) for value in (input, offset, weight)]
    output: Any = opset8.deformable_convolution(
        *inputs,
        strides,
        pads[:2],
        pads[2:],
        dilations,
        mask=widened(mask),
        group=groups,
        deformable_group=offset_groups,
        # Otherwise samples within one pixel outside of the image are 0.
        bilinear_interpolation_pad=True,
    )
    if bias is not None:
        channels = opset8.constant([1, -1, 1, 1], Type.i64)
        output = opset8.add(output, opset8.reshape(widened(bias), channels, special_zero=False))
    return (output if kind == wide else opset8.convert(output, kind)).outputs()


def _inputs(node: Any) -> list[Any]:
    """The inputs of a node; None for each that is optional and missing."""
    found = [node.get_input(i) for i in range(node.get_input_size())]
    # The node of the frontend of ONNX, and of that of PyTorch, for what is missing.
    missing = ("NullNode", "PtFrameworkNode")
    return [None if value.get_node().get_type_name() in missing else value for value in found]


def _fixed(value: Any, axis: int) -> int:
    size = value.get_partial_shape()[axis]
    if size.is_dynamic:
        raise ValueError(
            f"OpenVINO does not know the size of axis {axis} of an argument of deform_conv; {_CURE} if this is fixed"
        )
    return int(size.get_length())
