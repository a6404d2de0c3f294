"""deformkit's library in ONNX Runtime: its results, its errors, and what it needs."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz_onnxruntime
import nodes
import pytest
import torch
from rooms import CALLS, Call, needs_kernels

import deformkit as dk
from deformkit._kernels import selection
from deformkit._testing import assert_equal
from deformkit.onnx import _runtime
from deformkit.ops._operator import operators

CONVOLUTION = operators["deform_conv"]


@needs_kernels
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_are_those_of_torch(call: Call) -> None:
    """The same bits in each dtype, on one thread and on three."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        args = nodes.as_stored(call.arguments(dtype))
        expected = call.operator.overload(*args)
        for threads in (1, 3) if dtype == torch.float32 else (2,):
            assert_equal(nodes.result(call.operator, args, threads), expected, f"{dtype} on {threads} threads")


@needs_kernels
def test_channels_in_slices() -> None:
    """The rows of all channels are too long for one window: sums of half precision are rounded once, at the end."""
    input = torch.randn(1, 64, 4, 40000, dtype=torch.float16)
    offset, weight = torch.zeros(1, 2, 4, 40000, dtype=torch.float16), torch.randn(2, 64, 1, 1, dtype=torch.float16)
    args: list[Any] = [input, offset, weight, None, [1, 1], [0, 0], [1, 1], None, 0]
    assert_equal(nodes.result(CONVOLUTION, args), CONVOLUTION.overload(*args))


def convolution(**changes: Any) -> tuple[bytes, dict[str, Any]]:
    """A model of a convolution, some inputs and attributes of which are changed, or left out if they are None."""
    args: list[Any] = [torch.randn(1, 4, 9), torch.randn(1, 3, 9), torch.randn(2, 4, 3), None, [1], [1], [1], None, 0]
    inputs, attributes = nodes.inputs_of(CONVOLUTION, args), nodes.attributes_of(CONVOLUTION, args)
    for name, value in changes.items():
        (inputs if name in inputs else attributes)[name] = value
    given = {name: value for name, value in attributes.items() if value is not None}
    return nodes.model("deform_conv", inputs, given, torch.float32), inputs


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": torch.randn(1, 5, 9)}, "deformkit.deform_conv: offset's batch or channels do not fit; the call: "),
        (
            {"offset": torch.randn(1, 5, 9)},
            "input float32 [1, 4, 9], offset float32 [1, 5, 9], weight float32 [2, 4, 3]",
        ),
        ({"weight": torch.randn(2, 4, 3).double()}, "weight must have input's dtype; the call: input float32"),
        ({"input": torch.randn(4, 9)}, "must be 1, 2 or 3 spatial axes, not 0; the call: input float32 [4, 9]"),
        (
            {"offset": torch.ones(1, 1, 1, 1, 1, 1, 1, 1, 9)},
            "deformkit.deform_conv: offset has 9 axes; it must have at most 8",
        ),
        ({"bias": torch.zeros(3)}, "bias must have weight's output channels; the call: "),
        ({"stride": [1, 1]}, "stride, padding and dilation must have 1 values; the call: "),
        ({"boundary": 3}, "boundary must be 0 (zeros), 1 (border) or 2 (reflect); the call: "),
        ({"padding": [2**62]}, "must be at most 2^40; they are 9, 1, 4611686018427387904"),
        ({"stride": None}, "deformkit.deform_conv: the attribute stride: No attribute with this name is defined"),
        ({"boundary": 1.0}, "deformkit.deform_conv: the attribute boundary: "),
        ({"offset": None}, "is marked single but has an empty string in the graph"),
        ({"input": torch.ones(1, 4, 9, dtype=torch.int32)}, "Type 'tensor(int32)' of input parameter (input)"),
    ],
)
def test_wrong_nodes_are_errors_with_a_reason(changes: dict[str, Any], message: str) -> None:
    model, inputs = convolution(**changes)
    with pytest.raises(Exception) as caught:
        nodes.run(model, inputs)
    assert message in str(caught.value)


@needs_kernels
def test_random_models() -> None:
    counts = fuzz_onnxruntime.run(120, compare_every=2)
    assert counts["refused"] > 20 and counts["compared"] > 10


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where Linux shows what a process has loaded")
def test_a_process_without_torch(tmp_path: Path) -> None:
    """The runtime and NumPy alone, from a copy of the libraries, whose folder holds nothing else."""
    import numpy

    model, inputs = convolution()
    given = {name: value.numpy() for name, value in inputs.items() if value is not None}
    (tmp_path / "model.onnx").write_bytes(model)
    numpy.savez(tmp_path / "inputs.npz", **given)
    assert selection.path is not None
    for path in (Path(dk.onnx.library()), selection.path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    program = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library("./deformkit_onnxruntime.so")
session = onnxruntime.InferenceSession("model.onnx", options)
numpy.save("output.npy", session.run(None, dict(numpy.load("inputs.npz")))[0])
mapped = open("/proc/self/maps").read()
assert "deformkit_onnxruntime.so" in mapped
assert not any(name in mapped for name in ("libdeformkit.so", "libtorch", "libc10"))
assert not any(name in sys.modules for name in ("torch", "deformkit"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.from_numpy(numpy.load(tmp_path / "output.npy")), nodes.run(model, inputs))


@needs_kernels
def test_an_older_runtime_is_refused_with_its_version() -> None:
    """A runtime that has only the first version of the table, of which the library uses one function here."""
    said = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        said.append((code, message.decode()))
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def api(version: int) -> int | None:
        return ctypes.addressof(table) if version == 1 else None

    text = ctypes.create_string_buffer(b"1.16.3")

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def version() -> int:
        return ctypes.addressof(text)

    base = (ctypes.c_void_p * 2)(ctypes.cast(api, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p))
    register = ctypes.CDLL(dk.onnx.library()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert said == [(1, "deformkit needs ONNX Runtime 1.17 or later; this is 1.16.3")]


@needs_kernels
def test_without_kernels_the_error_says_so(tmp_path: Path) -> None:
    library = tmp_path / _runtime.LIBRARY
    library.write_bytes(Path(dk.onnx.library()).read_bytes())
    model, inputs = convolution()
    with pytest.raises(Exception, match="deformkit finds no kernels for this processor") as caught:
        nodes.run(model, inputs, library=str(library))
    assert "baseline: no deformkit_baseline.so beside deformkit_onnxruntime.so" in str(caught.value)


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_runtime, "_roots", [str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"installed without deformkit_onnxruntime.so. To compile the kernels"):
        dk.onnx.library()
