"""The export of a model to a file."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..ops._form import Form as InnerForm
from ..ops._form import NoPlainForm, exported_as
from ..ops._operator import NAMESPACE, operators
from ..ops._shape import check_choice
from ._functions import FOLDED, function, key_of
from ._report import Report, counted
from ._translate import VERSION, check_packages, standard_table, translation_table

Form = Literal["deformkit", "standard", "gridsample", "plain"]

_INNER: dict[str, InnerForm] = {"deformkit": "", "standard": "standard", "gridsample": "gridsample", "plain": "plain"}


def export(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    form: Form = "deformkit",
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 19,
) -> Report:
    """Export a model to an ONNX file.

    Args:
        model: in eval mode.
        args: example arguments, a tuple.
        path: of the file.
        form: how the operators of deformkit appear in it.

            - ``"deformkit"``: as nodes of the domain ``deformkit``, for which the file also contains functions of
              standard operators; a runtime without kernels for the nodes runs these. RoI pooling with a
              ``sampling_ratio`` of 0 has no function, because the number of its operations depends on the RoIs.
            - ``"standard"``: two-dimensional convolutions without ``boundary`` as ``DeformConv``, all else as standard
              operators such as ``GatherElements``.
            - ``"gridsample"``: likewise, but images are sampled by ``GridSample``; coordinates must be finite.
            - ``"plain"``: as ``"standard"``, without ``DeformConv``.
        kwargs: further example arguments, by name.
        dynamic_shapes: as for :func:`torch.export.export`; by default all sizes are fixed. Batch, sizes, queries and
            the sizes of levels may be dynamic.
        input_names: of the inputs in the file.
        output_names: of the outputs in the file.
        opset: the version of the standard operators, 18 to 23; ``DeformConv`` needs 19, and ``"gridsample"`` at most
            19.

    Returns:
        A report of the operators in the file and of the runtimes that run it; ``print`` shows it.

    Raises:
        ImportError: the package onnx or onnxscript is missing.
        ValueError: the form is unknown, the opset does not fit it, or in a form without nodes of deformkit an RoI
            pooling has a ``sampling_ratio`` of 0.

    Example:
        >>> import tempfile, torch, deformkit
        >>> layer = deformkit.nn.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> path = tempfile.mkdtemp() + "/layer.onnx"
        >>> export(layer, (torch.randn(1, 3, 8, 8),), path).operators["deformkit.deform_conv"]
        1
    """
    check_packages()
    check_choice("form", form, get_args(Form))
    _check_opset(form, opset)
    with torch.no_grad(), exported_as(_INNER[form]):
        program = torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    table = translation_table() if form == "deformkit" else standard_table()
    names = {"input_names": input_names, "output_names": output_names}
    made = to_onnx(program, table, opset, **names)
    calls = {node: node.meta["node"] for node in made.model.graph if node.domain == NAMESPACE}
    simplified(made.model)
    _add_functions(made.model, calls, opset)
    made.save(os.fspath(path))
    inside = counted(node for each in made.model.functions.values() for node in each)
    alone = counted(node for node in made.model.graph if node.domain == NAMESPACE and not node.overload)
    return Report(Path(path), form, opset, counted(made.model.graph), inside, alone)


def _check_opset(form: str, opset: int) -> None:
    least, most = (19 if form in ("standard", "gridsample") else 18), (19 if form == "gridsample" else 23)
    if not least <= opset <= most:
        reason = "; runtimes disagree about GridSample of opset 20" if form == "gridsample" else ""
        raise ValueError(f"opset is {opset}; with form={form!r} it must be {least} to {most}{reason}")


def to_onnx(program: Any, table: Any, opset: int, **names: Any) -> Any:
    """The program as torch's exporter translates it, not yet simplified."""
    with _quiet():
        return torch.onnx.export(
            program, custom_translation_table=table, opset_version=opset, optimize=False, verbose=False, **names
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def simplified(model: Any) -> Any:
    """The model without superfluous nodes, and without constants that are larger than what they are computed from."""
    import onnxscript.optimizer

    with _quiet():
        onnxscript.optimizer.optimize(model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    return model


def _add_functions(model: Any, calls: Mapping[Any, Any], opset: int) -> None:
    """Give every node of ours in the graph a function, one for each configuration, unless there is none."""
    overloads: dict[Any, str] = {}
    nodes = [node for node in model.graph if node.domain == NAMESPACE]
    for node in nodes:
        operator = operators[node.op_type]
        args = [_value(argument) for argument in calls[node].args]
        key = key_of(operator, args)
        if key not in overloads:
            overloads[key] = str(len(overloads))
            try:
                made = function(operator, args, overloads[key], opset)
                model.functions[made.identifier()] = made
            except NoPlainForm:
                overloads[key] = ""
        node.overload = overloads[key]
    if nodes:
        model.graph.opset_imports[NAMESPACE] = VERSION
        # Overloads of functions are part of the format since version 10.
        model.ir_version = max(model.ir_version or 0, 10)


def _value(argument: Any) -> Any:
    """An argument of a traced call, with tensors and integers that stand for the traced ones."""
    if isinstance(argument, list | tuple):
        return [_value(each) for each in argument]
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument
