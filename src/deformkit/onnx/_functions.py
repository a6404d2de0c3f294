"""The functions that an ONNX model contains for runtimes without kernels: the references, for each configuration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._form import exported_as
from ..ops._operator import NAMESPACE, Operator
from ._translate import is_input, sizes_of

# Of what may become a constant when a model is simplified: shapes do, grids of positions do not.
FOLDED = 1024


def key_of(operator: Operator, args: Sequence[Any]) -> tuple[Any, ...]:
    """What a function depends on: the number of axes, the dtypes, the fixed sizes, and the plain arguments."""
    found: list[Any] = [operator.name]
    for value in args:
        if isinstance(value, Tensor):
            found.append((value.dtype, *(_fixed(size) for size in value.shape)))
        else:
            found.append(tuple(map(_fixed, value)) if isinstance(value, list | tuple) else value)
    return tuple(found)


def _fixed(size: Any) -> Any:
    return None if isinstance(size, torch.SymInt) else size


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


class _Reference(nn.Module):
    """The reference of an operator as a function of its tensors and of sizes that are not fixed."""

    def __init__(self, operator: Operator, args: Sequence[Any]) -> None:
        super().__init__()
        self.operator, self.args = operator, list(args)
        self.places: list[tuple[int, int | None]] = []
        for position, value in enumerate(args):
            if isinstance(value, Tensor):
                self.places.append((position, None))
            elif position in sizes_of(operator):
                self.places += [(position, i) for i, size in enumerate(value) if isinstance(size, torch.SymInt)]

    def examples(self) -> tuple[Any, ...]:
        found: list[Any] = []
        for position, index in self.places:
            value = self.args[position] if index is None else self.args[position][index]
            found.append(
                torch.zeros([_hint(s) for s in value.shape], dtype=value.dtype) if index is None else _hint(value)
            )
        return tuple(found)

    def dynamic(self) -> tuple[Any, ...]:
        auto, found = torch.export.Dim.AUTO, []
        for position, index in self.places:
            value = self.args[position]
            axes = (
                {} if index is not None else {i: auto for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt)}
            )
            found.append(axes if index is None else torch.export.Dim.DYNAMIC)
        return tuple(found)

    def forward(self, *values: Any) -> Tensor:
        full = [list(value) if isinstance(value, list | tuple) else value for value in self.args]
        for (position, index), value in zip(self.places, values, strict=True):
            if index is None:
                full[position] = value
            else:
                full[position][index] = value
        return self.operator.reference(*full)


def function(operator: Operator, args: Sequence[Any], overload: str, opset: int) -> Any:
    """The function of the node for a call with these arguments, whose tensors hold shapes and dtypes alone."""
    import onnx_ir as ir

    from ._export import simplified, to_onnx

    reference = _Reference(operator, args)
    with torch.no_grad(), exported_as("plain"):
        program = torch.export.export(reference, reference.examples(), dynamic_shapes=(reference.dynamic(),))
    model = simplified(to_onnx(program, {}, opset).model)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], {"value": ir.Attr("value", ir.AttributeType.TENSOR, value.const_value)})
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        graph.initializers.pop(name)

    given = dict(zip(reference.places, graph.inputs, strict=True))
    inputs = []
    for position, name in enumerate(operator.arguments):
        if not is_input(operator, position):
            continue
        own = given.get((position, None))
        inputs.append(own if own is not None else ir.Value(name=f"{name}_input"))
        for index, _ in enumerate(args[position] or ()) if position in sizes_of(operator) else ():
            if (position, index) in given:
                _take(graph, inputs[-1], index, given[position, index])
    graph.inputs[:] = inputs
    attributes = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None)
        for position, name in enumerate(operator.arguments)
        if not is_input(operator, position)
    ]
    made = ir.Function(NAMESPACE, operator.name, overload, graph=graph, attributes=attributes)
    made.opset_imports.update({"": opset})
    return made


def _take(graph: Any, vector: Any, index: int, scalar: Any) -> None:
    """Replace the input ``scalar`` of ``graph`` by the element ``index`` of the input ``vector``."""
    import numpy
    import onnx_ir as ir

    at = ir.node("Constant", [], {"value": ir.tensor(numpy.array(index, dtype=numpy.int64))})
    element = ir.node("Gather", [vector, at.outputs[0]], {"axis": 0})
    first = graph[0]
    graph.insert_before(first, [at, element])
    scalar.replace_all_uses_with(element.outputs[0])
