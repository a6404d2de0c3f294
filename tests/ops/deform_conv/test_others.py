"""Deformable convolution is compared with other implementations: values, and gradients if they have them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.ops.deform_conv.cases import CASES, Case

OURS = {1: dk.deform_conv1d, 2: dk.deform_conv2d, 3: dk.deform_conv3d}
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ZEROS = [case for case in CASES if case.boundary == "zeros"]
NAMES = ("input", "offset", "weight", "bias", "mask")


def call(case: Case, named: dict[str, Any]) -> Tensor:
    return OURS[case.axes](**named)


def named_gradients(case: Case, named: dict[str, Any]) -> dict[str, Tensor]:
    """Our output and gradients, by name, for the cotangent that :func:`evaluate` draws."""
    names, values = list(named), list(named.values())
    positions = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    results = evaluate(lambda *v: call(case, dict(zip(names, v, strict=True))), values, positions, torch.float64)
    return dict(zip(["output", *(names[i] for i in positions)], results, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_zero_offset_is_the_plain_convolution(case: Case, dtype: torch.dtype) -> None:
    named = case.arguments(dtype)
    named.update(offset=torch.zeros_like(named["offset"]), mask=None, boundary="zeros")
    names = [name for name in ("input", "weight", "bias") if named[name] is not None]

    def ours(*values: Tensor) -> Tensor:
        return call(case, {**named, **dict(zip(names, values, strict=True))})

    def plain(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        steps = (named["stride"], named["padding"], named["dilation"], case.groups)
        return PLAIN[case.axes](given["input"], given["weight"], given.get("bias"), *steps)

    values = [named[name] for name in names]
    positions = list(range(len(names)))
    actual = evaluate(ours, values, positions, dtype)
    truth = evaluate(plain, [v.double() for v in values], positions, dtype)
    reference = evaluate(plain, values, positions, dtype)
    for name, *results in zip(["output", *names], actual, truth, reference, strict=True):
        assert_close(*results, name=name)


def onnx_deform_conv(case: Case, named: dict[str, Any]) -> Tensor:
    """The same call with DeformConv of onnxruntime, which takes images; a sequence becomes an image of one row."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    extra = 2 - case.axes

    def image(value: Tensor) -> Any:
        return value.unsqueeze(2).numpy() if extra else value.numpy()

    offset = named["offset"]
    if extra:
        offset = torch.stack([torch.zeros_like(offset), offset], 2).flatten(1, 2)
    feeds = {"X": image(named["input"]), "W": image(named["weight"]), "offset": image(offset)}
    if case.bias:
        feeds["B"] = named["bias"].numpy()
    if case.modulated:
        feeds["mask"] = image(named["mask"])
    kind = onnx.TensorProto.DOUBLE
    node = onnx.helper.make_node(
        "DeformConv",
        [name if name in feeds else "" for name in ("X", "W", "offset", "B", "mask")],
        ["Y"],
        kernel_shape=[1] * extra + list(case.kernel_size),
        strides=[1] * extra + named["stride"],
        pads=([0] * extra + named["padding"]) * 2,
        dilations=[1] * extra + named["dilation"],
        group=case.groups,
        offset_group=case.offset_groups,
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(name, kind, value.shape) for name, value in feeds.items()],
        [onnx.helper.make_tensor_value_info("Y", kind, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result = torch.from_numpy(session.run(None, feeds)[0])
    return result.squeeze(2) if extra else result


@pytest.mark.parametrize("case", [c for c in ZEROS if c.axes < 3], ids=lambda c: c.name)
def test_values_are_those_of_onnxruntime(case: Case) -> None:
    named = case.arguments(torch.float64)
    assert_close(call(case, named), onnx_deform_conv(case, named))


TORCHVISION = """
import sys, torch
from torchvision.ops import deform_conv2d
work = []
for call, cotangent in torch.load(sys.argv[1]):
    tensors = {k: v.requires_grad_() for k, v in call.items() if isinstance(v, torch.Tensor)}
    output = deform_conv2d(**call)
    grads = torch.autograd.grad(output, list(tensors.values()), cotangent)
    work.append({"output": output.detach(), **dict(zip(tensors, grads))})
torch.save(work, sys.argv[2])
"""


@pytest.mark.skipif(
    "DEFORMKIT_RIVALS_PYTHON" not in os.environ,
    reason="DEFORMKIT_RIVALS_PYTHON does not name a Python with torchvision",
)
def test_values_and_gradients_are_those_of_torchvision(tmp_path: Path) -> None:
    cases = [case for case in ZEROS if case.axes == 2]
    calls, expected = [], []
    for case in cases:
        for seed in range(3):
            named = case.arguments(torch.float64, seed=seed)
            if seed == 2:  # on grid lines, including those of the border
                named["offset"] = named["offset"].round()
            expected.append(named_gradients(case, named))
            cotangent = torch.randn(
                expected[-1]["output"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
            del named["boundary"]
            calls.append(({k: v.detach() if isinstance(v, Tensor) else v for k, v in named.items()}, cotangent))
    torch.save(calls, tmp_path / "calls.pt")
    (tmp_path / "run.py").write_text(TORCHVISION)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run(
        [os.environ["DEFORMKIT_RIVALS_PYTHON"], tmp_path / "run.py", tmp_path / "calls.pt", tmp_path / "results.pt"],
        check=True,
        env=environment,
        stderr=sys.stderr,
    )
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == len(expected) == 3 * len(cases)
    for ours, theirs in zip(expected, results, strict=True):
        assert set(theirs) <= set(ours)
        for name, value in theirs.items():
            assert_close(ours[name], value, name=name)


@pytest.mark.parametrize("boundary", ["border", "zeros"])
@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("groups", "offset_groups", "stride", "dilation"), [(1, 1, 1, 1), (2, 4, 2, 3)])
def test_values_and_gradients_are_those_of_dc1d(
    boundary: str, modulated: bool, groups: int, offset_groups: int, stride: int, dilation: int
) -> None:
    dc1d = pytest.importorskip("dc1d.nn")
    layer = dc1d.DeformConv1d(8, 6, 3, stride, "valid", dilation, groups, unconstrained=True).double()
    input = torch.randn(2, 8, 24, dtype=torch.float64)
    size = (24 - 2 * dilation - 1) // stride + 1
    reach = 3.0 if boundary == "border" else 0.0
    position = torch.arange(size)[:, None] * stride + torch.arange(3) * dilation
    # For "zeros" the points lie in the input; for "border", which clamps as dc1d does, also outside.
    points = torch.rand(2, offset_groups, size, 3, dtype=torch.float64) * (23 + 2 * reach) - reach
    offsets = points - position
    mask = torch.rand_like(offsets) if modulated else None
    given = [input, offsets, layer.weight.detach(), layer.bias.detach(), *([mask] if modulated else [])]

    def theirs(input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (input, offsets), {"mask": mask})

    def ours(input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        offset, factor = (t if t is None else t.transpose(2, 3).flatten(1, 2) for t in (offsets, mask))
        return dk.deform_conv1d(input, offset, weight, bias, stride, 0, dilation, factor, boundary=boundary)

    results = [evaluate(f, given, list(range(len(given))), torch.float64) for f in (ours, theirs)]
    for name, one, other in zip(("output", *NAMES), *results, strict=False):
        assert_close(one, other, name=name)
