"""Deformable RoI pooling at sizes where a kernel divides its work, and where an index needs 64 bits."""

import numpy as np
import pytest
import torch
from peak import Peak
from rooms import Call, check, check_bits, needs_kernel

import deformkit as dk
from deformkit._testing import assert_equal
from deformkit.ops._operator import operators
from deformkit.ops.deform_roi_pool.cases import Case

OPERATOR = operators["deform_roi_pool"]

# Few points in fields of more than 16 MB; then many RoIs, channels or bins in small fields.
LARGE = [
    Case("1d-long", 1, 8, (600_000,), 40, (3,), bin_size=500.0),
    Case("1d-long-adaptive", 2, 4, (600_000,), 30, (5,), 1 / 4, sampling_ratio=0, bin_size=7.0, spread=1.5),
    Case("2d-large", 1, 34, (400, 391), 30, (3, 2), sampling_ratio=3, gamma=0.5, bin_size=60.0, spread=0.5),
    Case("2d-large-adaptive", 2, 20, (300, 500), 12, (2, 2), 1 / 8, sampling_ratio=0, bin_size=7.0, spread=0.5),
    Case("2d-large-plain", 1, 33, (390, 331), 12, (4, 3), with_offset=False, bin_size=30.0),
    Case("3d-large", 1, 33, (40, 61, 60), 9, (2, 3, 2), bin_size=8.0),
    Case("1d-many-bins", 2, 5, (300,), 7, (200,), sampling_ratio=1),
    Case("2d-many-rois", 3, 8, (30, 40), 101, (7, 7), bin_size=3.0, spread=0.5),
    Case("2d-many-channels", 2, 300, (19, 21), 7, (5, 5)),
    Case("2d-one-place", 2, 70, (3, 3), 150, (1, 1), sampling_ratio=1, bin_size=1.0),
    Case("3d-blocks", 2, 40, (9, 12, 11), 17, (3, 3, 3), sampling_ratio=0),
]
each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)


@each_large
def test_values_and_gradients(case: Case) -> None:
    call = Call(OPERATOR, case)
    check(call, call.arguments())


@pytest.mark.parametrize("name", ["1d-long", "2d-many-rois", "2d-many-channels", "2d-one-place"])
def test_sums_do_not_pass_through_a_half_dtype(name: str) -> None:
    call = Call(OPERATOR, next(case for case in LARGE if case.name == name))
    check(call, call.arguments(torch.bfloat16))


@each_large
def test_same_bits_at_any_number_of_threads(case: Case) -> None:
    call = Call(OPERATOR, case)
    check_bits(call, call.arguments())


@pytest.mark.huge
@needs_kernel("deform_roi_pool")
@pytest.mark.parametrize(
    ("channels", "size"),
    [(1, (2**31 + 1024,)), (32, (2**26 + 1024,)), (1, (2**16 + 1024, 2**15)), (1, (2**12 + 1024, 2**10, 2**9))],
    ids=["1d", "1d-channels", "2d", "3d"],
)
def test_more_than_2_to_the_31_elements(channels: int, size: tuple[int, ...]) -> None:
    """All elements share one place in memory: an index that overflows reads elsewhere or counts as outside."""
    axes, value, extent = len(size), 1.5, 256.0
    input = torch.full((1, 1, *[1] * axes), value, dtype=torch.float16).expand(1, channels, *size)
    assert input.numel() > 2**31
    low = [size[0] // 16 * i for i in range(16)] + [size[0] - 256, size[0] - 128, size[0] + 256]
    rois = torch.zeros(len(low), 1 + 2 * axes)
    rois[:, 1 + axes :] = torch.tensor([float(n) for n in reversed(size)])
    rois[:, axes] = torch.tensor([float(n) for n in low])
    rois[:, 2 * axes] = rois[:, axes] + extent
    offset = torch.zeros(len(low), axes, *[1] * axes, requires_grad=True)
    peak = Peak()
    output = dk.deform_roi_pool(input, rois, offset, output_size=1, sampling_ratio=2)
    expected = torch.tensor([value] * 17 + [value / 2, 0.0], dtype=torch.float16)
    assert_equal(output.flatten(1), expected.unsqueeze(1).expand(-1, channels))
    output.sum().backward()
    assert offset.grad is not None and not offset.grad.any()
    assert peak.so_far() < 300, "memory that grows with the input"


@pytest.mark.huge
@needs_kernel("deform_roi_pool")
def test_outside_of_channels_last_of_more_than_2_to_the_29_elements() -> None:
    """An index of 32 bits suffices, and what is outside does not become a position. The zeros are never touched."""
    side = 6000
    field = torch.from_numpy(np.zeros((1, side, side, 16), np.float16))
    assert 2**29 < field.numel() < 2**31
    field[:, :300] = 1
    rois = torch.tensor(
        [[0.0, 10.0, side + 5.0, 200.0, side + 90.0], [0.0, 10.0, -90.0, 200.0, -20.0], [0.0, 10.0, 10.0, 200.0, 100.0]]
    )
    offset = torch.zeros(3, 2, 1, 1, requires_grad=True)
    output = dk.deform_roi_pool(field.movedim(-1, 1), rois, offset, output_size=1, sampling_ratio=2)
    assert output[:, :, 0, 0].tolist() == [[0.0] * 16, [0.0] * 16, [1.0] * 16]
    output.sum().backward()
    assert offset.grad is not None and not offset.grad.any()


@pytest.mark.huge
@needs_kernel("deform_roi_pool")
def test_the_last_of_very_many_images() -> None:
    batch = 2**24 - 1
    input = torch.full((1, 1, 1), 1.5, dtype=torch.float16).expand(batch, 1, 2**8)
    assert input.numel() > 2**31
    rois = torch.tensor([[0.0, 8.0, 16.0], [batch - 1.0, 8.0, 16.0], [batch - 1.0, 256.0, 512.0]])
    peak = Peak()
    output = dk.deform_roi_pool(input, rois, output_size=1, sampling_ratio=2)
    assert output.flatten().tolist() == [1.5, 1.5, 0.0]
    with pytest.raises(ValueError, match=r"rois\[2, 0\] is 1.67772e\+07"):
        dk.deform_roi_pool(input, rois + torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1), output_size=1)
    assert peak.so_far() < 300, "memory that grows with the input"


@needs_kernel("deform_roi_pool")
def test_workspace_does_not_grow_with_the_samples() -> None:
    """The samples alone would take 379 MB here, and twice as much in the backward pass."""
    named = Case("many", 1, 64, (60, 80), 250, (7, 7), sampling_ratio=11, bin_size=12.0).arguments()
    args = list(named.values())
    peak = Peak()
    output = OPERATOR(*args)
    grads = operators["deform_roi_pool_backward"](output, *args, [True, True])
    kept = sum(t.numel() * t.element_size() for t in (output, *grads)) // 2**20
    assert peak.so_far() - kept < 150
