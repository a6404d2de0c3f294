"""The named inputs of all operators, and which operator they belong to."""

import importlib
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

from ..ops._operator import operators

ROOMS: dict[str, ModuleType] = {
    name: importlib.import_module(f"deformkit.ops.{name}.cases") for name in operators if not name.endswith("_backward")
}
"""The module of cases of each operator."""


def operator(case: Any) -> str:
    """The name of the operator that ``case`` belongs to."""
    return sys.modules[type(case).__module__].OPERATOR


def about(case: Any) -> dict[str, str]:
    """The entries of a row of results that identify its case."""
    return {"operator": operator(case), "case": case.name, "sizes": str(case)}


def tiny(name: str) -> list[Any]:
    """The first case of an operator for each number of axes."""
    return [next(case for case in ROOMS[name].CASES if case.axes == axes) for axes in (1, 2, 3)]


def of_shape(name: str, shape: list[int], settings: dict[str, Any]) -> Any:
    """The case of the operator ``name`` whose first argument has ``shape``.

    Args:
        name: of the operator.
        shape: of ``input`` or ``value``.
        settings: the other sizes and options, by the names of the fields of the operator's ``Case``.

    Raises:
        ValueError: the shape or a setting does not fit, by name.
    """
    room: Any = ROOMS[name]
    known = [field.name for field in fields(room.Case) if field.name not in room.FROM_SHAPE]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{setting} is no setting of {name}; there are {', '.join(known)}")
    return room.of_shape(shape, **settings)
