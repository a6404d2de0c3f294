"""Boundary "reflect" in the operators that share the sampler, by the kernels of each."""

from dataclasses import replace
from typing import Any

import pytest
import random_calls
import torch
from rooms import Call, check, check_bits

from deformkit.ops._operator import operators
from deformkit.ops.deform_aggregate.cases import Case as Aggregate
from deformkit.ops.deform_conv.cases import Case as Conv

# Small fields, that points leave on all sides; channel by channel; a field in windows, which points leave.
CASES: list[Any] = [
    Conv("1d", 2, 4, (7,), 4, (3,), padding=2, groups=2),
    Conv("2d", 1, 6, (4, 5), 3, (3, 3), padding=1, offset_groups=2),
    Conv("2d-depthwise", 2, 4, (6, 5), 4, (3, 3), padding=1, groups=4, offset_groups=4),
    Conv("3d", 1, 3, (3, 4, 2), 2, (2, 2, 2), padding=1),
    Conv("2d-windows", 1, 36, (300, 270), 1, (1, 2), stride=9, modulated=False, offset_std=40.0),
    Aggregate("1d", 2, (9,), 2, 5, (3,), padding=1),
    Aggregate("2d", 1, (5, 4), 2, 8, (3, 3), padding=1, offset_scale=2.0),
    Aggregate("3d", 1, (3, 2, 4), 1, 3, (3, 1, 3), padding=1),
    Aggregate("2d-large", 1, (400, 391), 1, 34, (2, 1), stride=19, offset_std=300.0),
]
CALLS = [
    Call(operators["deform_conv" if isinstance(case, Conv) else "deform_aggregate"], replace(case, boundary="reflect"))
    for case in CASES
]
every_call = pytest.mark.parametrize("call", CALLS, ids=str)


@every_call
def test_values_and_gradients(call: Call) -> None:
    check(call, call.arguments())
    check_bits(call, call.arguments())


@every_call
def test_special_offsets(call: Call) -> None:
    named = call.case.arguments()
    wild = torch.tensor((*random_calls.WILD, torch.nan))
    values = wild[torch.randint(len(wild), named["offset"].shape)]
    named["offset"] = torch.where(torch.rand(named["offset"].shape) < 0.1, values, named["offset"])
    check(call, call.operator.ordered(named))
