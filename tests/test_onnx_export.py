"""``deformkit.onnx``: the forms of a file, and their results in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import Call, Of, representatives
from torch import Tensor, nn

import deformkit as dk
from deformkit._kernels import selection
from deformkit._testing import assert_close
from deformkit._testing.resized import resized
from deformkit.onnx import _translate
from deformkit.ops._operator import operators

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def answer(path: Path, *values: Tensor, library: bool = False) -> Tensor:
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(dk.onnx.library())
    session = onnxruntime.InferenceSession(path, options)
    feeds = {node.name: value.numpy() for node, value in zip(session.get_inputs(), values, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def check_answers(path: Path, values: Sequence[Tensor], truth: Tensor, expected: Tensor) -> None:
    """The functions in the file and, if it is built, the library give the same result."""
    assert_close(answer(path, *values), truth, expected)
    if selection.path is not None:
        found = answer(path, *values, library=True)
        assert_close(found, truth, expected)
        assert found.dtype == expected.dtype


def check_constants(path: Path) -> None:
    """No constant is larger than a shape, except for the parameters of the model."""
    model = onnx.load(path)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                assert attribute.t.ByteSize() <= 256, (node.op_type, attribute.t.dims)


# The other operators have tests of their own below.
OTHERS = [f"deform_{name}-1d" for name in ("aggregate", "conv_transpose", "correlate", "roi_pool", "splat")]


@pytest.mark.parametrize("call", [call for call in representatives() if str(call) in OTHERS], ids=str)
def test_every_operator_is_a_node_with_a_function(call: Call, tmp_path: Path) -> None:
    model, path = Of(call).eval(), tmp_path / "model.onnx"
    report = dk.onnx.export(model, model.values, path)
    name = call.operator.name
    assert report.operators[f"deformkit.{name}"] == 1 and "GatherElements" not in report.operators
    assert {(f.domain, f.name) for f in onnx.load(path).functions} == {("deformkit", name)}
    check_constants(path)
    expected = model(*model.values)
    truth = call.operator.reference(*call.arguments(torch.float64)).reshape(expected.shape)
    check_answers(path, model.values, truth, expected)


class Attention(nn.Module):
    """Attention to two levels, the sizes of which follow the input's."""

    def forward(self, fine: Tensor, coarse: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        value = torch.cat([fine, coarse], 1).unflatten(2, (2, -1))
        return dk.ms_deform_attn(value, [fine.shape[1], coarse.shape[1]], locations, weights)


def test_batch_sizes_queries_and_levels_may_be_dynamic(tmp_path: Path) -> None:
    def drawn(batch: int, fine: int, coarse: int, queries: int) -> tuple[Tensor, ...]:
        fields = torch.randn(batch, fine, 4), torch.randn(batch, coarse, 4)
        return (*fields, torch.rand(batch, queries, 2, 2, 3, 1) * 1.4 - 0.2, torch.randn(batch, queries, 2, 2, 3))

    batch, fine, coarse, queries = (torch.export.Dim(name, min=2, max=500) for name in ("b", "f", "c", "q"))
    axes = {"fine": {0: batch, 1: fine}, "coarse": {0: batch, 1: coarse}}
    axes |= {name: {0: batch, 1: queries} for name in ("locations", "weights")}
    path = tmp_path / "model.onnx"
    dk.onnx.export(Attention().eval(), drawn(2, 9, 5, 4), path, dynamic_shapes=axes)
    check_constants(path)
    for sizes in ((2, 9, 5, 4), (3, 17, 20, 7)):
        values = drawn(*sizes)
        check_answers(path, values, Attention()(*(v.double() for v in values)), Attention()(*values))


@pytest.mark.parametrize("name", ["deform_splat", "deform_roi_pool"])
def test_sizes_that_no_other_test_changes_stay_dynamic(name: str, tmp_path: Path) -> None:
    """The size onto which is splatted, and the number of images from which RoIs are pooled."""
    (call,) = (call for call in resized(1) if call.name == name)
    path = tmp_path / "model.onnx"
    dk.onnx.export(call.module, call.draw(2, 6), path, dynamic_shapes=call.dynamic_shapes())
    values = call.draw(3, 9)
    expected = call.module(*values)
    truth = call.module.double()(*(v.double() for v in values))
    check_answers(path, values, truth, expected)


class Pooled(nn.Module):
    """Two poolings, one of which takes as many samples as an RoI is long."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        first, second = (dk.deform_roi_pool(input, rois, output_size=3, sampling_ratio=ratio) for ratio in (2, 0))
        return first - second


@pytest.mark.parametrize("form", ["standard", "gridsample", "plain"])
def test_pooling_whose_operations_depend_on_the_rois_has_no_standard_form(form: Any, tmp_path: Path) -> None:
    values = torch.randn(2, 4, 9), torch.tensor([[0.0, 1.0, 6.0], [1.0, 2.0, 4.0]])
    with pytest.raises(ValueError, match="sampling_ratio is 0; in a model of plain operations it must be at least 1"):
        dk.onnx.export(Pooled().eval(), values, tmp_path / "model.onnx", form=form)


def test_pooling_whose_operations_depend_on_the_rois_is_a_node_without_a_function(tmp_path: Path) -> None:
    def drawn(images: int, rois: int) -> tuple[Tensor, Tensor]:
        low, length = 6 * torch.rand(rois, 1), 8 * torch.rand(rois, 1)
        return torch.randn(images, 4, 9), torch.cat([torch.randint(images, (rois, 1)), low, low + length], 1)

    path, shapes = tmp_path / "model.onnx", ({0: torch.export.Dim("images")}, {0: torch.export.Dim("rois")})
    report = dk.onnx.export(Pooled().eval(), drawn(2, 5), path, dynamic_shapes=shapes)
    assert report.alone == {"deformkit.deform_roi_pool": 1} and report.operators["deformkit.deform_roi_pool"] == 2
    assert len(onnx.load(path).functions) == 1 and "OpenVINO: no: deformkit.deform_roi_pool" in str(report)
    if selection.path is not None:
        for values in (drawn(2, 5), drawn(3, 1), drawn(1, 0)):
            assert torch.equal(answer(path, *values, library=True), Pooled()(*values))


class Convolutions(nn.Module):
    """Two alike, with groups and a mask, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dk.nn.PackedDeformConv2d(4, 4, 3, padding=1, groups=2)
        self.second = dk.nn.PackedDeformConv2d(4, 4, 3, padding=1, groups=2)
        self.third = dk.nn.PackedDeformConv2d(4, 6, (1, 3), stride=2, dilation=2, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, input: Tensor) -> Tensor:
        return self.third(self.second(self.first(input)))


@pytest.mark.parametrize(
    ("form", "dtype"), [("deformkit", torch.float16), ("standard", torch.float16), ("standard", torch.float32)]
)
def test_convolutions(form: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, input, path = Convolutions().eval().to(dtype), torch.randn(2, 4, 9, 10).to(dtype), tmp_path / "model.onnx"
    report = dk.onnx.export(model, (input,), path, form=form)
    with torch.no_grad():
        expected, truth = model(input), model.double()(input.double())
    assert answer(path, input).dtype == dtype
    check_answers(path, [input], truth, expected)
    if form == "standard":
        assert report.operators["DeformConv"] == 3 and not report.inside and report.opset == 19
        assert "OpenVINO: with the rules" in str(report) and "DeformConv 3" in str(report)
    else:
        overloads = [node.overload for node in onnx.load(path).graph.node if node.domain == "deformkit"]
        assert len(overloads) == 3 and overloads[0] == overloads[1] != overloads[2]
        assert len(onnx.load(path).functions) == 2 and report.inside["GatherElements"] > 0


class Sampling(nn.Module):
    def forward(self, input: Tensor, points: Tensor) -> Tensor:
        return dk.deform_sample(input, points) + dk.deform_sample(input, points, boundary="border")


def test_grid_sample_is_bilinear_in_the_old_notation(tmp_path: Path) -> None:
    values, path = (torch.randn(2, 4, 7, 8), torch.rand(2, 1, 5, 2) * 12 - 3), tmp_path / "model.onnx"
    report = dk.onnx.export(Sampling(), values, path, form="gridsample")
    assert report.operators["GridSample"] == 2 and report.runtimes["TensorRT"] == "yes"
    modes = [a.s for node in onnx.load(path).graph.node if node.op_type == "GridSample" for a in node.attribute]
    assert modes.count(b"bilinear") == 2 and b"linear" not in modes
    truth = Sampling()(*(v.double() for v in values))
    assert torch.allclose(answer(path, *values).double(), truth, atol=1e-5)


def test_the_table_translates_an_exported_program(tmp_path: Path) -> None:
    program = torch.export.export(Sampling(), (torch.randn(2, 4, 7, 8), torch.rand(2, 1, 5, 2)))
    table = dk.onnx.translation_table()
    assert set(table) == {operator.overload for name, operator in operators.items() if not name.endswith("_backward")}
    made = torch.onnx.export(program, custom_translation_table=table, opset_version=19, verbose=False)
    nodes = [node for node in made.model.graph if node.domain == "deformkit"]
    assert [node.op_type for node in nodes] == ["deform_sample"] * 2
    assert [node.attributes["boundary"].value for node in nodes] == [0, 1]


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args: tuple[Any, ...] = (Sampling(), (torch.randn(2, 4, 7, 8), torch.rand(2, 1, 5, 2)), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="form is 'fast'; it must be one of 'deformkit', 'standard'"):
        dk.onnx.export(*args, form="fast")
    with pytest.raises(ValueError, match="opset is 20; with form='gridsample' it must be 19 to 19; runtimes disagree"):
        dk.onnx.export(*args, form="gridsample", opset=20)
    with pytest.raises(ValueError, match="opset is 18; with form='standard' it must be 19 to 23"):
        dk.onnx.export(*args, form="standard", opset=18)
    monkeypatch.setattr(_translate, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install deformkit\[onnx\]"):
        dk.onnx.export(*args)
