"""Factors of a point, in a mask or among attention weights, that are no finite number."""

from typing import Any

import pytest
import torch
from rooms import Call

from deformkit._testing import assert_equal, evaluate
from deformkit._testing.cases import operator
from deformkit.ops._operator import operators
from deformkit.ops.deform_aggregate.cases import Case as Aggregate
from deformkit.ops.deform_conv.cases import Case as Convolve
from deformkit.ops.ms_deform_attn.cases import Case as Attend

# A field that is laid out, one in which few points are read, and groups of one channel with offsets of their own.
CASES = [
    Convolve("dense", 2, 8, (9, 10), 4, (3, 3), padding=1),
    Convolve("sparse", 2, 8, (60, 70), 4, (1, 1), stride=20),
    Convolve("depthwise", 2, 8, (9, 10), 8, (3, 3), padding=1, groups=8, offset_groups=8),
    Convolve("sequence", 2, 8, (30,), 4, (3,)),
    Aggregate("aggregate", 2, (9, 10), 2, 5, (3, 3), padding=1),
    Attend("attend", 2, ((9, 10), (4, 5)), 7, 2, 5, (2, 2)),
]
# Where the coordinates and the factors are among the arguments, and the first point of each.
PLACES = {
    "deform_conv": ("offset", "mask", (0, 0), (0, 0)),
    "deform_aggregate": ("offset", "weight", (0, ..., 0, 0), (0, ..., 0)),
    "ms_deform_attn": ("sampling_locations", "attention_weights", (0, 0, 0, 0), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [None, 900.0, torch.inf], ids=["inside", "outside", "infinite"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_they_show_wherever_the_point_is(case: Any, where: float | None, factor: float) -> None:
    """Results are finite only where those of the reference are; outside, the output is 0 times the factor."""
    call = Call(operators[operator(case)], case)
    args = call.arguments()
    coordinates, factors, point, place = PLACES[call.operator.name]
    if where is not None:
        args[call.operator.arguments.index(coordinates)][point] = where
    args[call.operator.arguments.index(factors)][place] = factor
    found, expected = (
        evaluate(function, args, call.positions(args), torch.float32)
        for function in (call.operator, call.operator.reference)
    )
    assert_equal(found[0].isfinite(), expected[0].isfinite(), "output")
    assert not found[0].isfinite().all()
    for i, one, other in zip(call.positions(args), found[1:], expected[1:], strict=True):
        name = call.operator.arguments[i]
        # A point that no coordinate moves may have 0 or 0 times the factor as its gradient.
        assert (other.isfinite() >= one.isfinite()).all(), f"gradient of {name}"
        if name != coordinates:
            assert_equal(one.isfinite(), other.isfinite(), f"gradient of {name}")
    if where is not None:
        assert_equal(found[0].isnan(), expected[0].isnan(), "output")
