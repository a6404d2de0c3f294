"""Multi-scale deformable attention at sizes where a kernel divides its work, and where an index needs 64 bits."""

from math import prod

import numpy as np
import pytest
import torch
from peak import Peak
from rooms import Call, check, check_bits, needs_kernel

import deformkit as dk
from deformkit._testing import assert_equal
from deformkit.ops._operator import operators
from deformkit.ops.ms_deform_attn.cases import Case

OPERATOR = operators["ms_deform_attn"]

LARGE = [
    Case("1d-long", 1, ((100_000,), (3_000,)), 300, 4, 16, (3, 2)),
    Case("1d-many-queries", 2, ((700,), (300,)), 3001, 3, 20, (2, 3)),
    Case("1d-near", 1, ((3000,), (1500,)), 4500, 2, 32, (4, 4), near=2.0),
    Case("2d-decoder", 3, ((50, 61), (25, 31), (13, 16)), 150, 8, 32, (4, 4, 4), reach=0.0),
    Case("2d-encoder", 2, ((31, 37), (16, 19), (8, 10)), 1459, 5, 24, (4, 4, 4), near=2.0),
    Case("2d-encoder-nearest", 1, ((31, 37), (16, 19), (8, 10)), 1459, 5, 24, (4, 1, 2), mode="nearest", near=2.0),
    Case("2d-wide", 1, ((400, 391),), 211, 2, 70, (5,)),
    Case("2d-many-heads", 1, ((20, 21),), 97, 67, 3, (3,)),
    Case("2d-many-samples", 19, ((6, 7), (3, 4)), 13, 2, 8, (2, 2)),
    Case("2d-one-pixel", 2, ((1, 1), (1, 1)), 2003, 2, 16, (3, 2)),
    Case("3d-volume", 1, ((16, 20, 21), (8, 10, 11)), 900, 3, 16, (4, 4)),
    Case("3d-near", 1, ((9, 10, 11), (4, 5, 6)), 1110, 2, 33, (3, 2), near=2.0),
]
each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)


@each_large
def test_values_and_gradients(case: Case) -> None:
    call = Call(OPERATOR, case)
    check(call, call.arguments())


@pytest.mark.parametrize("name", ["1d-many-queries", "2d-encoder", "2d-one-pixel", "3d-near"])
def test_sums_do_not_pass_through_a_half_dtype(name: str) -> None:
    call = Call(OPERATOR, next(case for case in LARGE if case.name == name))
    check(call, call.arguments(torch.bfloat16))


@needs_kernel("ms_deform_attn")
@each_large
def test_same_bits_at_any_number_of_threads_and_in_any_batch(case: Case) -> None:
    call = Call(OPERATOR, case)
    args = call.arguments()
    output = check_bits(call, args)
    if case.batch > 1:
        last = [v[-1:] if i in OPERATOR.batched and v is not None else v for i, v in enumerate(args)]
        assert_equal(OPERATOR(*last), output[-1:])


@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [32, 21])
def test_same_bits_for_few_and_for_many_queries(channels: int, dtype: torch.dtype) -> None:
    """A head's field is read where it is if points are few, else laid out; one of over 4 MiB is asked for ahead."""
    sizes, heads = ((190, 200), (95, 100)), 8
    length = sum(map(prod, sizes))
    value = torch.randn(1, length, heads, channels).to(dtype)
    queries = 2 * length  # of 2 points on each level
    locations, weights = torch.rand(1, queries, heads, 2, 2, 2), torch.rand(1, queries, heads, 2, 2).to(dtype)
    locations[:, : length // 8] *= 5  # mostly outside
    output = dk.ms_deform_attn(value, sizes, locations, weights)
    for few in (length // 8, length // 5):
        assert_equal(dk.ms_deform_attn(value, sizes, locations[:, :few], weights[:, :few]), output[:, :few])


@pytest.mark.huge
@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(
    ("heads", "channels", "sizes"),
    [
        (1, 1, [(2**33,)]),
        (4, 8, [(2**28,)]),
        (1, 1, [(2**17, 2**16)]),
        (1, 1, [(2**13, 2**10, 2**10)]),
        (1, 2, [(2**16, 2**16), (2**10, 2**10), (5, 3)]),
    ],
    ids=["1d", "1d-channels", "2d", "3d", "2d-levels"],
)
def test_more_than_2_to_the_31_elements(heads: int, channels: int, sizes: list[tuple[int, ...]], mode: str) -> None:
    """All positions and heads share one place in memory: an overflowing index reads elsewhere or counts as outside."""
    axes, levels, value = len(sizes[0]), len(sizes), 1.5
    length = sum(map(prod, sizes))
    field = torch.full((1, 1, 1, channels), value, dtype=torch.float16).expand(1, length, heads, channels)
    # From one end to the other along the first axis, in the middle of the others; every step is exact.
    along = torch.tensor([0.125, 0.25, 0.5, 0.75, 0.875])
    locations = torch.full((1, 5, heads, levels, 1, axes), 0.5)
    locations[..., -1] = along.reshape(1, 5, 1, 1, 1)
    locations.requires_grad_()
    weights = torch.ones(1, 5, heads, levels, 1, dtype=torch.float16, requires_grad=True)
    peak = Peak()
    output = dk.ms_deform_attn(field, sizes, locations, weights, mode=mode)
    assert_equal(output, torch.full_like(output, value * levels))
    output.sum().backward()
    assert_equal(weights.grad, torch.full_like(weights, value * channels))
    assert_equal(locations.grad, torch.zeros_like(locations))
    assert peak.so_far() < 300, "memory that grows with the value"


@pytest.mark.huge
@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("edge", [-0.01, 1.01, -5.0, 7.0])
def test_outside_of_a_level_behind_2_to_the_29_elements(edge: float) -> None:
    """A point outside the second level must not become a position in the first. The zeros are never touched."""
    first, heads, channels = 1449, 8, 32
    length = first * first + 400
    value = torch.from_numpy(np.zeros((1, length, heads, channels), np.float16))
    value[:, : 8 * first] = 1
    locations = torch.full((1, 3, heads, 2, 1, 2), 0.5)
    locations[..., 1] = edge
    weights = torch.ones(1, 3, heads, 2, 1, dtype=torch.float16)
    weights[:, :, :, 0] = 0
    locations.requires_grad_(), weights.requires_grad_()
    output = dk.ms_deform_attn(value, [(first, first), (20, 20)], locations, weights)
    assert_equal(output, torch.zeros_like(output))
    output.sum().backward()
    assert_equal(weights.grad[:, :, :, 1], torch.zeros_like(weights[:, :, :, 1]))
    assert_equal(locations.grad[:, :, :, 1], torch.zeros_like(locations[:, :, :, 1]))


@needs_kernel("ms_deform_attn")
@pytest.mark.parametrize("exponent", [30, 33, 40])
def test_end_of_a_long_level_in_float32(exponent: int) -> None:
    """A location of 1 is half a pixel beyond the last centre, so the last pixel counts half."""
    value = torch.full((1, 1, 1, 2), 1.5).expand(1, 2**exponent, 1, 2)
    locations = torch.tensor([1.0, 0.0, 0.5]).reshape(1, 3, 1, 1, 1, 1)
    output = dk.ms_deform_attn(value, [(2**exponent,)], locations, torch.ones(1, 3, 1, 1, 1))
    assert output[0, :, 0].tolist() == [0.75, 0.75, 1.5]
