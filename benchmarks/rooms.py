"""The operators' cases, and which operator a case is of."""

import sys
from typing import Any

from deformkit.ops.deform_aggregate import cases as aggregate
from deformkit.ops.deform_conv import cases as conv
from deformkit.ops.deform_roi_pool import cases as roi
from deformkit.ops.ms_deform_attn import cases as attn

ROOMS: dict[str, Any] = {room.OPERATOR: room for room in (conv, attn, aggregate, roi)}


def operator(case: Any) -> str:
    return sys.modules[type(case).__module__].OPERATOR


def about(case: Any) -> dict[str, str]:
    """What every row of a table says of its case."""
    return {"operator": operator(case), "case": case.name, "sizes": str(case)}


def tiny(name: str) -> list[Any]:
    """The first case of an operator for each number of axes."""
    return [next(case for case in ROOMS[name].CASES if case.axes == axes) for axes in (1, 2, 3)]
