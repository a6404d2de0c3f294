"""Deformable convolution at sizes where a kernel divides its work, and where an index needs 64 bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peak import Peak
from rooms import Call, check, check_bits

import deformkit as dk
from deformkit import _kernels
from deformkit._testing import assert_equal
from deformkit.ops._operator import operators
from deformkit.ops._shape import code_of
from deformkit.ops.deform_conv.cases import Case

OPERATOR = operators["deform_conv"]

# Few points in fields of more than 16 MB, near the grid or anywhere; then many points in small fields.
LARGE = [
    Case("1d-long", 1, 8, (600_000,), 3, (2,), stride=97),
    Case("1d-long-wild", 1, 8, (600_000,), 3, (2,), stride=97, offset_std=1e5),
    Case("1d-long-border", 2, 2, (1_300_000,), 2, (3,), stride=500, offset_std=30.0, boundary="border"),
    Case("2d-large", 1, 34, (400, 391), 5, (1, 2), stride=7, padding=1, groups=1, offset_groups=2),
    Case("2d-large-wild", 1, 34, (400, 391), 6, (2, 1), stride=9, groups=2, offset_groups=17, offset_std=300.0),
    Case("2d-large-border", 2, 20, (300, 500), 4, (1, 1), stride=(3, 7), offset_std=100.0, boundary="border"),
    Case("2d-large-depthwise", 1, 36, (390, 330), 36, (2, 2), stride=9, groups=36, offset_groups=36),
    Case("3d-large", 1, 33, (40, 61, 60), 4, (1, 1, 2), stride=(4, 5, 5), groups=1, offset_groups=3),
    Case("3d-large-wild", 1, 33, (40, 61, 60), 3, (2, 1, 1), stride=4, groups=3, offset_groups=1, offset_std=40.0),
    Case("1d-blocks", 3, 48, (3001,), 20, (5,), padding=2, groups=2, offset_groups=2),
    Case("2d-blocks", 2, 72, (37, 41), 40, (3, 3), padding=1, groups=2, offset_groups=3),
    Case("2d-blocks-depthwise", 1, 130, (31, 33), 130, (3, 3), padding=1, groups=130, offset_groups=2),
    Case("1d-offsets-per-channel", 2, 70, (3001,), 70, (3,), padding=4, dilation=4, groups=70, offset_groups=70),
    Case("2d-offsets-per-channel", 1, 19, (41, 38), 38, (3, 3), padding=1, groups=19, offset_groups=19),
    Case("2d-one-position", 3, 100, (3, 3), 70, (3, 3)),
    Case("2d-many-images", 19, 10, (9, 8), 9, (3, 2), padding=1),
    Case("1d-many-outputs", 1, 3, (157,), 5000, (2,)),
    Case("3d-blocks", 1, 40, (9, 12, 11), 16, (3, 3, 3), padding=1),
]
each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)


@each_large
def test_values_and_gradients(case: Case) -> None:
    call = Call(OPERATOR, case)
    check(call, call.arguments())


@pytest.mark.parametrize("name", ["1d-long-wild", "2d-large-wild", "2d-blocks", "2d-offsets-per-channel"])
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
    ("channels", "size", "stride"),
    [
        (1, (2**31 + 64,), (2**27,)),
        (32, (2**26 + 64,), (2**22,)),
        (1, (2**16 + 64, 2**15), (2**12, 2**15)),
        (1, (2**11 + 64, 2**10, 2**10), (2**7, 2**10, 2**10)),
    ],
    ids=["1d", "1d-channels", "2d", "3d"],
)
def test_more_than_2_to_the_31_elements(channels: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """All elements share one place in memory: an index that overflows reads elsewhere or counts as outside."""
    axes = len(size)
    value = 1.5
    input = torch.full((1, 1, *[1] * axes), value, dtype=torch.float16).expand(1, channels, *size)
    assert input.numel() > 2**31
    count = 17
    offset = torch.zeros(1, axes, count, *[1] * (axes - 1))
    offset[0, 0, -2:, ...] = torch.tensor([0.25, 63.5]).reshape(-1, *[1] * (axes - 1))
    offset.requires_grad_()
    weight = torch.full((1, channels, *[1] * axes), 2.0, dtype=torch.float16, requires_grad=True)
    peak = Peak()
    function = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}[axes]
    output = function(input, offset, weight, stride=stride)
    whole = channels * 2.0 * value
    assert output.flatten().tolist() == [whole] * (count - 1) + [whole / 2]
    output.sum().backward()
    assert offset.grad[0, 0].flatten().tolist() == [0.0] * (count - 1) + [-whole]
    assert weight.grad.flatten().tolist() == [value * (count - 0.5)] * channels
    assert peak.so_far() < 300, "memory that grows with the input"


WITH_ISA = """
import sys, torch
from deformkit._testing import assert_close
from deformkit import _kernels
from rooms import CALLS, double
from deformkit._testing import evaluate
assert _kernels.selection.isa == sys.argv[1], _kernels.selection
for call in CALLS:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        args = call.arguments(dtype)
        positions = call.positions(args)
        actual, reference = (evaluate(f, args, positions, dtype) for f in (call.operator, call.operator.reference))
        truth = evaluate(call.operator.reference, double(args), positions, dtype)
        for results in zip(actual, truth, reference):
            assert_close(*results, name=f"{call} in {dtype}")
"""


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    """The libraries for older processors; torch can be told to behave like one."""
    if _kernels.selection.isa in ("baseline", isa):
        pytest.skip(f"the suite itself runs the {_kernels.selection.isa} library")
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": {"avx2": "avx2", "baseline": "default"}[isa],
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command: list[Any] = [sys.executable, "-c", WITH_ISA, isa]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_workspace_does_not_grow_with_the_image() -> None:
    """The columns of all positions would take 324 MB here, and twice as much in the backward pass."""
    input = torch.randn(1, 16, 750, 750)
    offset = torch.zeros(1, 18, 750, 750)
    weight = torch.randn(16, 16, 3, 3)
    peak = Peak()
    output = OPERATOR(input, offset, weight, None, [1, 1], [1, 1], [1, 1], None, code_of("boundary", "zeros"))
    backward = operators["deform_conv_backward"]
    args = (input, offset, weight, None, [1, 1], [1, 1], [1, 1], None, code_of("boundary", "zeros"))
    grads = backward(output, *args, [True, True, True, False, False])
    kept = sum(t.numel() * t.element_size() for t in (output, *grads)) // 2**20
    assert peak.so_far() - kept < 150


@pytest.mark.slow
def test_double_backward_uses_bounded_memory() -> None:
    """The call uses the reference in parts, because it needs dozens of times the memory of the columns."""
    code = """
import torch, deformkit as dk
from peak import Peak

def second(size):
    shapes = (1, 16, size, size), (1, 18, size, size), (16, 16, 3, 3), (1, 9, size, size)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    output = dk.deform_conv2d(*leaves[:3], padding=1, mask=leaves[3])
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

second(20)
peak = Peak()
second(300)
print(peak.so_far())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    # The columns are 49 MiB.
    assert int(run.stdout) < 8 * 49


@pytest.mark.parametrize("far", [3e8, -3e8, 1e12], ids=str)
def test_border_of_a_long_sequence(far: float) -> None:
    """At 2^28 positions, float32 cannot represent single positions; points far outside are still clamped to the end."""
    size, count = 2**28 + 64, 17
    input = torch.full((1, 1, 1), 1.5).expand(1, 1, size)
    offset, weight = torch.full((1, 1, count), far), torch.full((1, 1, 1), 2.0)
    output = dk.deform_conv1d(input, offset, weight, stride=2**24, boundary="border")
    assert output.flatten().tolist() == [3.0] * count


def test_a_far_offset_costs_its_own_time_alone() -> None:
    """One point far outside its window does not enlarge the window to the whole image: the workspace stays small."""
    # With two, a busy machine may give the first call one thread, and the second call the workspaces of both.
    torch.set_num_threads(1)
    input, weight = torch.randn(1, 32, 700, 700), torch.randn(4, 32, 3, 3)
    offset = torch.zeros(1, 18, 234, 234)
    peak = Peak()
    near = dk.deform_conv2d(input, offset, weight, stride=3, padding=1)
    of_near = peak.so_far()
    offset[0, 0, 100, 100] = 600.0
    far = dk.deform_conv2d(input, offset, weight, stride=3, padding=1)
    assert peak.so_far() < of_near + 8
    same = (near == far)[0].all(0)
    assert same.sum() == same.numel() - 1 and not same[100, 100]


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (8, 2), (3, 3)], ids=["dense", "narrow", "depthwise"])
def test_gradient_of_the_weight_over_many_positions(channels: int, groups: int) -> None:
    """The parts of a million positions are not added up one by one: digits would be lost."""
    input, offset = torch.rand(1, channels, 1000, 1000), torch.zeros(1, 2, 1000, 1000)
    weight = torch.ones(channels, channels // groups, 1, 1, requires_grad=True)
    [found] = torch.autograd.grad(dk.deform_conv2d(input, offset, weight).sum(), weight)
    truth = input.double().sum((0, 2, 3)).reshape(groups, 1, -1).expand(-1, channels // groups, -1)
    assert (found.reshape(truth.shape) / truth - 1).abs().max() < 1e-6
