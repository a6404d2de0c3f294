"""``verify`` finds and reports differences between two models, and changes neither."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk


def layer(**options: Any) -> nn.Module:
    made = dk.nn.PackedDeformConv2d(2, 3, 3, padding=1, **options)
    nn.init.normal_(made.offset_head.weight, std=0.3)
    nn.init.constant_(made.offset_head.bias, 0.3)
    return made


def by_grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Attention with one level of 5x6 and one head."""
    field = value[:, :, 0].transpose(1, 2).unflatten(-1, (5, 6))
    reads = F.grid_sample(field, 2 * locations[:, :, 0, 0] - 1, align_corners=False)
    return (reads * weights[:, None, :, 0, 0]).sum(-1).transpose(1, 2)


def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return dk.ms_deform_attn(value, [(5, 6)], locations, weights)


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 30, 1, 4), torch.rand(2, 7, 1, 1, 3, 2), torch.rand(2, 7, 1, 1, 3)


def test_every_output_and_gradient() -> None:
    one = layer()
    report = dk.verify(one, copy.deepcopy(one), torch.randn(1, 2, 5, 6))
    names = [quantity.name for quantity in report.quantities]
    assert names == ["output", "gradient of inputs[0]", *(f"gradient of {n}" for n, _ in one.named_parameters())]
    assert report.ok and all(quantity.absolute == 0 for quantity in report.quantities)
    assert [q.name for q in dk.verify(one, one, torch.randn(1, 2, 5, 6), gradients=False).quantities] == ["output"]


def test_rounding_passes() -> None:
    report = dk.verify(by_grid_sample, ours, attention_inputs())
    assert report.ok, report
    assert [quantity.name for quantity in report.quantities] == [
        "output",
        *(f"gradient of inputs[{i}]" for i in range(3)),
    ]
    assert any(quantity.absolute > 0 for quantity in report.quantities)
    assert all(quantity.errors is not None for quantity in report.quantities)
    assert any("another order" in note for note in report.notes)


@pytest.mark.parametrize("error", [1e-4, float("nan"), float("inf")])
def test_a_wrong_element_is_found(error: float) -> None:
    def wrong(*args: Tensor) -> Tensor:
        output = ours(*args)
        change = torch.zeros_like(output)
        change[1, 4, 2] = error
        return output + change

    report = dk.verify(by_grid_sample, wrong, attention_inputs())
    assert not report.ok
    (found,) = [quantity for quantity in report.quantities if not quantity.ok]
    assert found.name == "output" and found.index == (1, 4, 2)
    expected = error if error == 1e-4 else float("inf")
    assert found.absolute == pytest.approx(expected, rel=0.1)
    with pytest.raises(AssertionError, match=r"output .*\[1, 4, 2\].* OFF"):
        report.check()
    with pytest.raises(AssertionError, match="1 of 4 differ by more than rounding"):
        dk.verify(by_grid_sample, wrong, attention_inputs(), strict=True)


def test_a_wrong_gradient_is_found() -> None:
    def wrong(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ours(value, locations.detach() + 0 * locations, weights)

    report = dk.verify(by_grid_sample, wrong, attention_inputs())
    assert [quantity.name for quantity in report.quantities if not quantity.ok] == ["gradient of inputs[1]"]


def test_a_wrong_parameter_is_found() -> None:
    one = layer()
    other = copy.deepcopy(one)
    other.weight.data[2, 1, 0, 0] += 1e-3
    report = dk.verify(one, other, {"input": torch.randn(1, 2, 5, 6)})
    wrong = {quantity.name for quantity in report.quantities if not quantity.ok}
    assert {"output", "gradient of inputs['input']"} <= wrong
    assert "gradient of weight" not in wrong, "it does not depend on the weight"


def test_without_a_float64_run_half_of_the_digits_count() -> None:
    def only_float32(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x * 2

    inputs = torch.randn(100)
    report = dk.verify(only_float32, lambda x: x * 2.0001, inputs)
    assert report.ok and report.quantities[0].errors is None
    assert "No float64 run to compare with: TypeError: float32 only" in str(report)
    assert not dk.verify(only_float32, lambda x: x * 2.002, inputs).ok


def test_dropout_is_the_same_on_both_sides() -> None:
    one = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5))
    inputs = torch.randn(8, 16)
    assert dk.verify(one, copy.deepcopy(one), inputs).ok
    other = nn.Sequential(one[0], nn.Dropout(0.4))
    assert not dk.verify(one, other, inputs).ok


def test_modules_stay_as_they_are() -> None:
    one = nn.Sequential(layer(), nn.BatchNorm2d(3), nn.Dropout(0.3), nn.ReLU(inplace=True)).train()
    other = copy.deepcopy(one).eval()
    one[0].weight.grad = torch.ones_like(one[0].weight)
    one[0].bias.requires_grad_(False)
    inputs = torch.randn(4, 2, 5, 6, requires_grad=True)
    before = [copy.deepcopy(module.state_dict()) for module in (one, other)]
    values, state = inputs.detach().clone(), torch.get_rng_state()
    report = dk.verify(one, other, inputs)
    assert not report.ok, "one of them trains"
    assert torch.equal(torch.get_rng_state(), state)
    assert one.training and one[1].training and not other.training
    for module, old in zip((one, other), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    assert torch.equal(one[0].weight.grad, torch.ones_like(one[0].weight)) and one[0].offset_head.weight.grad is None
    assert inputs.grad is None and torch.equal(inputs, values)
    assert not one[0].bias.requires_grad
    assert "gradient of 0.bias" in {quantity.name for quantity in report.quantities}


def test_changes_its_input_in_place() -> None:
    one = nn.ReLU(inplace=True)
    assert dk.verify(one, F.relu, torch.randn(5)).ok


def test_nested_outputs_and_inputs() -> None:
    def function(pair: tuple[Tensor, Tensor], *, options: dict[str, Any]) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1], "rest": [pair[0] * options["factor"], (pair[1].argmax(), "text", None)]}

    inputs = {"pair": (torch.randn(3), torch.randn(3)), "options": {"factor": torch.tensor(2.0)}}
    report = dk.verify(function, function, inputs)
    assert [quantity.name for quantity in report.quantities] == [
        "output.sum",
        "output.rest[0]",
        "output.rest[1][0]",
        "gradient of inputs['pair'][0]",
        "gradient of inputs['pair'][1]",
        "gradient of inputs['options']['factor']",
    ]
    assert report.ok


def test_other_shapes_and_names() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    other.load_state_dict({"weight": one.weight.detach()})
    report = dk.verify(one, other, torch.randn(2, 4))
    assert "Only a has gradient of bias; nothing is compared there." in report.notes
    report = dk.verify(lambda x: x, lambda x: x[:1], torch.randn(2, 4))
    assert not report.ok and report.quantities[0].absolute == float("inf")
    with pytest.raises(ValueError, match=r"a gives output, gradient of .* and b gives output.x.*; they have no output"):
        dk.verify(lambda x: x, lambda x: {"x": x}, torch.randn(2))


def test_nothing_to_call() -> None:
    with pytest.raises(TypeError, match="b is a NoneType; it must be a module or a function"):
        dk.verify(F.relu, None, torch.randn(2))


# The report


def said(function: Callable[..., Any], inputs: Any) -> str:
    return " ".join(dk.verify(function, function, inputs).notes)


def test_notes_count_points_at_minus_one() -> None:
    # The first tap of a padded layer without offsets samples at -1 in the first row and column.
    made = dk.nn.PackedDeformConv2d(2, 3, 3, padding=1)
    assert "16 of 36 points lie exactly at -1" not in said(layer(), torch.randn(1, 2, 2, 2))
    corner = sum((h == 0 and kh == 0) or (w == 0 and kw == 0) for h, w, kh, kw in PLACES)
    text = said(made, torch.randn(1, 2, 2, 2))
    assert f"{corner} of 36 points lie exactly at -1 on an axis" in text
    assert "36 of 36 points lie on a grid line" in text

    locations = torch.full((1, 1, 1, 1, 2, 2), 0.37)
    locations[..., 0, 1] = -0.1  # times 5 less 1/2
    text = said(
        lambda value, p, w: dk.ms_deform_attn(value, [(5, 6)], p, w), [*ATTENTION[:1], locations, *ATTENTION[1:]]
    )
    assert "1 of 2 points lie exactly at -1 on an axis" in text

    offset = torch.full((1, 2, 2, 1, 9, 2), 0.3)
    offset[0, 0, 0, 0, 4, 1] = -1
    value, weight = torch.randn(1, 2, 2, 1, 3), torch.randn(1, 2, 2, 1, 9)
    text = said(lambda *args: dk.deform_aggregate(*args, 3, padding=1), (value, offset, weight))
    assert "1 of 36 points lie exactly at -1 on an axis" in text


PLACES = [(h, w, kh, kw) for h in range(2) for w in range(2) for kh in range(3) for kw in range(3)]
ATTENTION = torch.randn(1, 30, 1, 4), torch.rand(1, 1, 1, 1, 2)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_notes_explain_half_precision(half: torch.dtype) -> None:
    text = said(layer().to(half), torch.randn(1, 2, 5, 6).to(half))
    assert f"In {str(half).removeprefix('torch.')} deformkit accumulates in float32" in text
    assert "rounded to half precision" in text
    assert "half" not in said(layer(), torch.randn(1, 2, 5, 6))


def test_report_is_a_table() -> None:
    lines = str(dk.verify(by_grid_sample, ours, attention_inputs())).splitlines()
    assert lines[0].split() == "quantity dtype difference relative at a's error b's error allowed".split()
    assert [line.split()[0] for line in lines[1:5]] == ["output", "gradient", "gradient", "gradient"]
    assert "equal up to rounding" in lines
