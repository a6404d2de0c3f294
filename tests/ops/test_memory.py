"""Allocation failures raise an error, and no memory leaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_library import compiled
from rooms import needs_kernels

TESTS = Path(__file__).parents[1]

FAILING = r"""
import ctypes, re, sys, torch
sys.path.insert(0, sys.argv[1])
from rooms import representatives
from deformkit._testing import assert_equal

library = ctypes.CDLL(None)
torch.set_num_threads(2)

def all_of(result):
    return result if isinstance(result, tuple) else (result,)

for call in representatives(each_axes=False):
    args = call.arguments()
    backward = call.backward_arguments(args)
    for operator, values in ((call.operator.overload, args), (call.backward_operator.overload, backward)):
        expected = all_of(operator(*values))
        number, failed, said, reached = 0, 0, 0, True
        while reached:
            number += 1
            library.choose_failing_allocation(number)
            try:
                result = all_of(operator(*values))
            except MemoryError as error:
                failed += 1
                assert "alloc" in str(error), error
                said += bool(re.search(r"could not allocate \d+ bytes", str(error)))
            else:
                # An allocation that the standard library can do without, or the last one is behind us.
                for one, other in zip(result, expected):
                    assert_equal(one, other)
            reached = library.allocations_seen() >= number
            library.choose_failing_allocation(-1)
        for one, other in zip(all_of(operator(*values)), expected):
            assert_equal(one, other)
        assert failed >= 10 and said > 0, (str(call), failed, said, number)
print("done")
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="the library is put before others as Linux does")
def test_every_allocation_may_fail(tmp_path: Path) -> None:
    """Each allocation fails in turn, with two threads: a MemoryError, no deadlock, and right results afterwards."""
    library = compiled("failing_allocation", tmp_path)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", FAILING, str(TESTS)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr


GROWTH = """
import ctypes, sys, torch
from pathlib import Path
import deformkit as dk

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024

torch.manual_seed(0)
levels = [(12, 12), (6, 6)]
rois = torch.tensor([[0.0, 1, 1, 20, 20], [0, 5, 5, 30, 25]])

def learned(*shape):
    return torch.randn(shape).requires_grad_()

flow = learned(1, 2, 8, 9)
LAYERS = {
    "conv": (dk.nn.PackedDeformConv2d(8, 8, 3, padding=1, modulated=True), [torch.randn(1, 8, 12, 12)]),
    "depthwise": (dk.nn.PackedDeformConv1d(16, 16, 3, groups=16, offset_groups=16), [torch.randn(1, 16, 200)]),
    "aggregate": (dk.nn.DCNv4(32, group=2), [torch.randn(1, 7, 7, 32)]),
    "attention": (
        dk.nn.MSDeformAttn(32, n_levels=2, n_heads=2),
        [torch.randn(1, 20, 32), torch.rand(1, 20, 2, 2), torch.randn(1, 180, 32), levels],
    ),
    "roi": (dk.nn.PackedDeformRoIPool(2, 8), [torch.randn(1, 8, 12, 12), rois / 2]),
    "transposed": (dk.nn.PackedDeformConvTranspose2d(8, 8, 2, stride=2, modulated=True), [torch.randn(1, 8, 8, 9)]),
    "sample": (dk.nn.Warp2d(), [learned(1, 8, 12, 12), learned(1, 2, 12, 12)]),
    "splat": (dk.nn.SoftmaxSplat(), [learned(1, 8, 8, 9), learned(1, 2, 8, 9), learned(1, 1, 8, 9)]),
    "correlate": (dk.nn.CorrelationLookup(levels=2, radius=1), [learned(1, 8, 8, 9) for _ in "qk"] + [flow]),
}

def grow(layer, inputs):
    # Some layers have no parameters, and differentiate by their inputs alone.
    leaves = [*layer.parameters(), *(x for x in inputs if getattr(x, "requires_grad", False))]
    optimizer = torch.optim.SGD(leaves, lr=1e-4)

    def step():
        optimizer.zero_grad()
        layer(*inputs).square().mean().backward()
        optimizer.step()

    # What another layer has freed would hide a leak.
    ctypes.CDLL(None).malloc_trim(0)
    for _ in range(200):
        step()
    before = resident()
    for number in range(1, 5001):
        step()
        # What an allocator keeps once comes early; what a step leaks keeps the pace.
        if number >= 500 and number % 250 == 0 and resident() - before < 20 * number / 5000:
            break
    return resident() - before

for name in sys.argv[1:]:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(name, threads, grow(*LAYERS[name]))
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize(
    "layers",
    [["conv", "depthwise", "transposed"], ["aggregate", "attention", "roi"], ["sample", "splat", "correlate"]],
    ids=" ".join,
)
def test_training_does_not_accumulate_memory(layers: list[str]) -> None:
    """5,000 steps may keep 20 MiB, on one thread and on two. The loop ends early once it keeps proportionally less."""
    run = subprocess.run([sys.executable, "-c", GROWTH, *layers], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in found] == [name for name in layers for _ in (1, 2)]
    grown = [line for line in found if float(line[-1]) >= 20]
    assert not grown, "MiB of resident memory that a training loop gained, on so many threads"
