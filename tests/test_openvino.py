"""``deformkit.openvino``: models in OpenVINO, at batch and sizes other than those that were exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit import openvino as ours
from deformkit._testing import assert_close
from deformkit._testing.resized import Resized, resized

openvino: Any = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

CALLS = [each for axes in (1, 2, 3) for each in resized(axes)]
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def answer(model: Any, *values: Tensor) -> Tensor:
    (output,) = openvino.compile_model(model, "CPU", EXACT)([value.numpy() for value in values]).values()
    return torch.from_numpy(output)


def operations(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def check(model: Any, module: nn.Module, *values: Tensor) -> None:
    with torch.no_grad():
        expected = module(*values)
        truth = module.double()(*(value.double() for value in values))
    module.float()
    assert_close(answer(model, *values), truth, expected)


@pytest.mark.parametrize("each", CALLS, ids=str)
def test_every_operator(each: Resized) -> None:
    model = ours.convert(each.module.eval(), each.draw(2, 6), dynamic_shapes=each.dynamic_shapes())
    assert ("DeformableConvolution" in operations(model)) == (str(each) == "deform_conv-2d")
    check(model, each.module, *each.draw(3, 9))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dk.nn.PackedDeformConv2d(4, 4, 3, padding=1, groups=2, offset_groups=2, modulated=True)
        self.second = dk.nn.PackedDeformConv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False)
        self.third = dk.nn.PackedDeformConv2d(6, 2, 3, boundary="border")
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, input: Tensor) -> Tensor:
        return self.third(self.second(self.first(input)))


DYNAMIC = ({axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)},)


@pytest.mark.parametrize("form", ["deformkit", "standard", "program"])
def test_files_and_programs(form: Any, tmp_path: Path) -> None:
    module, input, path = Convolutions().eval(), torch.randn(2, 4, 12, 9), tmp_path / "model.onnx"
    if form == "program":
        program = torch.export.export(module, (input,), dynamic_shapes=DYNAMIC)
        model = ours.convert(program)
    else:
        pytest.importorskip("onnxscript")
        dk.onnx.export(module, (input,), path, form=form, dynamic_shapes=DYNAMIC)
        model = ours.convert(path)
    assert operations(model).count("DeformableConvolution") == 2
    check(model, module, torch.randn(3, 4, 15, 10))


@pytest.mark.parametrize("form", ["deformkit", "standard"])
def test_the_rules_alone_serve_the_frontends(form: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    module, input, path = Convolutions().first.eval(), torch.randn(2, 4, 12, 9), tmp_path / "model.onnx"
    dk.onnx.export(module, (input,), path, form=form, dynamic_shapes=DYNAMIC)
    core = openvino.Core()
    core.add_extension(ours.extensions())
    check(core.read_model(path), module, torch.randn(3, 4, 15, 10))


def test_what_has_no_rule_names_the_function_that_helps() -> None:
    (sample,) = (each for each in CALLS if str(each) == "deform_sample-2d")
    program = torch.export.export(sample.module, sample.draw(2, 6))
    with pytest.raises(Exception, match=r"no operation for deformkit\.deform_sample; deformkit\.openvino\.convert\(\)"):
        openvino.convert_model(program, extension=ours.extensions())
    with pytest.raises(TypeError, match="args is None; a module needs example arguments"):
        ours.convert(sample.module)
    with pytest.raises(TypeError, match="a program or a file has its own shapes"):
        ours.convert(program, sample.draw(2, 6))


def test_half_precision(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    module, input, path = Convolutions().first.eval(), torch.randn(2, 4, 12, 9).half(), tmp_path / "model.onnx"
    dk.onnx.export(module.half(), (input,), path)
    with torch.no_grad():
        expected, truth = module(input), module.double()(input.double())
    found = answer(ours.convert(path), input)
    assert found.dtype == torch.float16
    assert_close(found, truth, expected)
