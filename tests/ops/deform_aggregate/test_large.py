"""Deformable aggregation at sizes where a kernel divides its work, and where an index needs 64 bits."""

import numpy as np
import pytest
import torch
from peak import Peak
from rooms import Call, check, check_bits

import deformkit as dk
from deformkit._testing import assert_equal
from deformkit.ops._operator import operators
from deformkit.ops._shape import code_of
from deformkit.ops.deform_aggregate.cases import Case

OPERATOR = operators["deform_aggregate"]

# Few points in fields of more than 16 MB, near the grid or anywhere; then many points in small fields.
LARGE = [
    Case("1d-long", 1, (600_000,), 2, 4, (2,), stride=97),
    Case("1d-long-wild", 1, (600_000,), 1, 8, (2,), stride=97, offset_std=1e5),
    Case("1d-long-border", 2, (1_300_000,), 2, 1, (3,), stride=500, offset_std=30.0, boundary="border"),
    Case("2d-large", 1, (400, 391), 2, 17, (1, 2), stride=7, padding=1),
    Case("2d-large-wild", 1, (400, 391), 1, 34, (2, 1), stride=9, offset_std=300.0),
    Case("2d-large-border", 2, (300, 500), 4, 5, (1, 1), stride=(3, 7), offset_std=100.0, boundary="border"),
    Case("2d-large-heads", 1, (390, 330), 18, 2, (3, 3), stride=9, remove_center=True),
    Case("3d-large", 1, (40, 61, 60), 3, 11, (1, 1, 2), stride=(4, 5, 5)),
    Case("3d-large-wild", 1, (40, 61, 60), 11, 3, (2, 1, 1), stride=4, offset_std=40.0),
    Case("1d-blocks", 3, (3001,), 2, 24, (5,), padding=2),
    Case("2d-blocks", 2, (37, 41), 3, 32, (3, 3), padding=1),
    Case("2d-many-heads", 1, (31, 33), 70, 1, (3, 3), padding=1, offset_scale=2.0),
    Case("2d-one-head", 2, (41, 38), 1, 67, (3, 3), padding=1, remove_center=True),
    Case("2d-one-position", 3, (3, 3), 7, 16, (3, 3)),
    Case("2d-many-images", 19, (9, 8), 2, 5, (3, 2), padding=1),
    Case("3d-blocks", 1, (9, 12, 11), 2, 16, (3, 3, 3), padding=1),
]
each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)


@each_large
def test_values_and_gradients(case: Case) -> None:
    call = Call(OPERATOR, case)
    check(call, call.arguments())


@pytest.mark.parametrize("name", ["1d-long-wild", "2d-large-wild", "2d-blocks", "2d-many-heads"])
def test_sums_do_not_pass_through_a_half_dtype(name: str) -> None:
    call = Call(OPERATOR, next(case for case in LARGE if case.name == name))
    check(call, call.arguments(torch.bfloat16))


@each_large
def test_same_bits_at_any_number_of_threads_and_in_any_batch(case: Case) -> None:
    call = Call(OPERATOR, case)
    args = call.arguments()
    output = check_bits(call, args)
    if case.batch > 1:
        last = [v[-1:] if i in OPERATOR.batched and v is not None else v for i, v in enumerate(args)]
        assert_equal(OPERATOR(*last), output[-1:])


@pytest.mark.huge
@pytest.mark.parametrize(
    ("heads", "channels", "size", "stride"),
    [
        (1, 1, (2**31 + 64,), (2**27,)),
        (1, 32, (2**26 + 64,), (2**22,)),
        (16, 2, (2**26 + 64,), (2**22,)),
        (1, 1, (2**16 + 64, 2**15), (2**12, 2**15)),
        (1, 1, (2**11 + 64, 2**10, 2**10), (2**7, 2**10, 2**10)),
    ],
    ids=["1d", "1d-channels", "1d-heads", "2d", "3d"],
)
def test_more_than_2_to_the_31_elements(
    heads: int, channels: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """All positions and heads share one place in memory: an overflowing index reads elsewhere or counts as outside."""
    axes, count, content = len(size), 17, 1.5
    value = torch.full((*[1] * (axes + 2), channels), content, dtype=torch.float16).expand(1, *size, heads, channels)
    assert value.numel() > 2**31
    maps = (1, count, *[1] * (axes - 1), heads, 1)
    offset = torch.zeros(*maps, axes)
    offset[0, -2:, ..., 0] = torch.tensor([0.25, 63.5]).reshape(-1, *[1] * (axes + 1))
    offset.requires_grad_()
    weight = torch.full(maps, 2.0, dtype=torch.float16, requires_grad=True)
    peak = Peak()
    output = dk.deform_aggregate(value, offset, weight, 1, stride)
    whole = 2 * content
    for channel in output.flatten(-2).reshape(count, -1).T:
        assert channel.tolist() == [whole] * (count - 1) + [whole / 2]
    output.sum().backward()
    for head in offset.grad[..., 0, 0].reshape(count, heads).T:
        assert head.tolist() == [0.0] * (count - 1) + [-whole * channels]
    for head in weight.grad.reshape(count, heads).T:
        assert head.tolist() == [content * channels] * (count - 1) + [content * channels / 2]
    assert peak.so_far() < 300, "memory that grows with the value"


@pytest.mark.huge
def test_outside_of_a_field_of_more_than_2_to_the_29_elements() -> None:
    """An index of 32 bits suffices, and what is outside does not become a position. The zeros are never touched."""
    side = 6000
    value = torch.from_numpy(np.zeros((1, side, side, 1, 16), np.float16))
    assert 2**29 < value.numel() < 2**31
    value[:, :300] = 1
    offset = torch.zeros(1, 3, 1, 1, 1, 2)
    offset[0, :, 0, 0, 0, 0] = torch.tensor([-2.0, float(side), 2.0 * side])
    offset.requires_grad_()
    weight = torch.ones(1, 3, 1, 1, 1, dtype=torch.float16, requires_grad=True)
    output = dk.deform_aggregate(value, offset, weight, 1, (2500, side))
    assert_equal(output, torch.zeros_like(output))
    output.sum().backward()
    assert offset.grad is not None and weight.grad is not None
    assert not offset.grad.any() and not weight.grad.any()


def test_workspace_does_not_grow_with_the_image() -> None:
    """The samples of all taps would take 324 MB here, and twice as much in the backward pass."""
    value = torch.randn(1, 750, 750, 2, 8)
    weight = torch.zeros(1, 750, 750, 2, 9)
    offset = torch.zeros(1, 750, 750, 2, 9, 2)
    steps = ([3, 3], [1, 1], [1, 1], [1, 1], 1.0, False, code_of("boundary", "zeros"))
    peak = Peak()
    output = OPERATOR(value, offset, weight, *steps)
    grads = operators["deform_aggregate_backward"](output, value, offset, weight, *steps, [True, True, True])
    kept = sum(t.numel() * t.element_size() for t in (output, *grads)) // 2**20
    assert peak.so_far() - kept < 150
