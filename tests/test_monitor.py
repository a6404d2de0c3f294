"""``monitor`` measures samples and warns of common mistakes; ``param_groups`` finds the offset heads."""

import warnings
from collections.abc import Callable
from math import log
from typing import Any

import pytest
import stand_ins
import torch
from patched import attention
from torch import Tensor, nn

import deformkit as dk
from deformkit.ops import _suspect


class Written:
    """Stands for a writer of TensorBoard."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value


def network(**options: Any) -> nn.Sequential:
    first = dk.nn.PackedDeformConv2d(3, 4, 3, padding=1, modulated=True, **options)
    return nn.Sequential(first, nn.ReLU(), dk.nn.PackedDeformConv2d(4, 4, 3, stride=2))


def shift(layer: nn.Module, *coordinates: float, taps: int = 9) -> None:
    """Move all taps of a packed layer by the same offset."""
    with torch.no_grad():
        layer.offset_head.bias[: taps * len(coordinates)] = torch.tensor(coordinates).repeat(taps)


def test_measurements() -> None:
    model, writer = network(), Written()
    shift(model[0], 3.0, 4.0)
    with dk.monitor(model, writer) as monitor:
        model(torch.randn(2, 3, 20, 30))
    first, second = monitor.latest["0"], monitor.latest["2"]
    assert list(monitor.latest) == ["0", "2"] and monitor.step == 1 and monitor.first_nan is None
    assert first["offset_mean"] == first["offset_max"] == pytest.approx(5) and first["offset_std"] == 0
    # Along h the taps start at rows -1, 0 and 1; moved by 3, they leave the 20 rows for the last 2, 3 and 4.
    inside = sum((20 - h) * (30 - w) for h in (2, 3, 4) for w in (3, 4, 5)) / (9 * 20 * 30)
    assert first["outside"] == pytest.approx(1 - inside)
    assert first["dead_taps"] == 0 and first["mask_entropy"] == pytest.approx(1)
    assert second == {"offset_mean": 0, "offset_std": 0, "offset_max": 0, "outside": 0, "dead_taps": 0}
    assert writer.scalars["deformkit/0/offset_mean", 0] == first["offset_mean"]
    assert len(writer.scalars) == len(first) + len(second)
    assert [line.split()[0] for line in str(monitor).splitlines()] == ["layer", "0", "2"]


def test_dead_taps_and_entropy() -> None:
    input, offset = torch.randn(1, 2, 6, 7), torch.zeros(1, 18, 6, 7)
    mask = torch.zeros(1, 9, 6, 7)
    mask[:, :2] = 1
    offset[:, 1] = 8
    layer = dk.nn.DeformConv2d(2, 2, 3, padding=1)
    with dk.monitor(layer) as monitor:
        layer(input, offset, mask)
    # Seven taps have no weight, and one of the others is outside everywhere.
    assert monitor.latest[""]["dead_taps"] == pytest.approx(8 / 9)
    assert monitor.latest[""]["mask_entropy"] == pytest.approx(log(2) / log(9))


def test_steps_and_removal() -> None:
    model, writer = network(), Written()
    monitor = dk.monitor(model, writer, every=3)
    for _ in range(5):
        model(torch.randn(1, 3, 8, 8))
    assert {step for _, step in writer.scalars} == {0, 3} and monitor.step == 5
    monitor.remove()
    monitor.remove()
    model(torch.randn(1, 3, 8, 8))
    assert monitor.step == 5 and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failed_step_ends_measuring() -> None:
    model = network()
    with dk.monitor(model) as monitor:
        with pytest.raises(ValueError, match="in_channels=3"):
            model(torch.randn(1, 5, 8, 8))
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        assert not model[0]._forward_hooks
        model(torch.randn(1, 3, 8, 8))
        assert list(monitor.latest) == ["0", "2"]


def test_gradients_and_compiled_models_are_as_without() -> None:
    model, input = network(), torch.randn(1, 3, 8, 8)
    gradients = []
    compiled = torch.compile(model, backend="eager")
    for run in (model, compiled):
        model.zero_grad()
        with dk.monitor(run) as monitor:
            run(input).square().sum().backward()
        assert list(monitor.latest) == ["0", "2"]
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    model(input).square().sum().backward()
    for found in gradients:
        assert all(torch.equal(one, p.grad) for one, p in zip(found, model.parameters(), strict=True))


def test_nan_is_named_once() -> None:
    model = network()
    with torch.no_grad():
        model[2].offset_head.bias[0] = torch.nan
    with dk.monitor(model) as monitor:
        with pytest.warns(UserWarning, match=r"layer '2' has NaN in its offset in step 0.*clip gradients"):
            model(torch.randn(1, 3, 8, 8))
        model(torch.randn(1, 3, 8, 8))
    assert monitor.first_nan is not None
    assert (monitor.first_nan.step, monitor.first_nan.layer, monitor.first_nan.tensor) == (0, "2", "offset")


def test_exploding_offsets_are_named_once() -> None:
    model = network()
    shift(model[2], 15.0, 0.0)
    with dk.monitor(model):
        with pytest.warns(UserWarning, match=r"layer '2': 100% of the samples lie outside.*param_groups"):
            model(torch.randn(1, 3, 12, 20))
        model(torch.randn(1, 3, 12, 20))


def pixels(height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")


@pytest.mark.parametrize("swapped", [False, True])
def test_swapped_offsets(swapped: bool) -> None:
    rows, columns = pixels(10, 60)
    towards_middle = [4.5 - rows, 29.5 - columns]
    offset = torch.stack(towards_middle[::-1] if swapped else towards_middle).repeat(9, 1, 1).unsqueeze(0)
    layer = dk.nn.DeformConv2d(2, 2, 3, padding=1)
    with dk.monitor(layer), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(1, 2, 10, 60), offset)
    assert ["h before w" in str(w.message) for w in caught] == [True] * swapped


UNITS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "right": (lambda points: points, None),
    "y before x": (lambda points: points.flip(-1), "must be x first"),
    "-1 to 1": (lambda points: 2 * points - 1, "as grid_sample takes them"),
    "pixels": (lambda points: points * torch.tensor([20.0, 8.0]), "are these pixels"),
}


@pytest.mark.parametrize("units", UNITS)
def test_units_of_locations(units: str) -> None:
    convert, message = UNITS[units]
    shapes = [(8, 20), (4, 10)]
    centres = []
    for height, width in shapes:
        rows, columns = pixels(height, width)
        centres.append(torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], -1).flatten(0, 1))
    points = convert(torch.cat(centres)).reshape(1, 200, 1, 2)
    layer, memory = dk.nn.MSDeformAttn(16, 2, 4), torch.randn(1, 200, 16)
    with dk.monitor(layer) as monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(memory, points, memory, shapes)
    assert [message is not None and message in str(w.message) for w in caught] == [True] * (message is not None)
    assert not _suspect.given
    if message is None:
        # A new layer's points lie 1 to 4 pixels from their query.
        assert monitor.latest[""]["offset_mean"] == pytest.approx(2.5)
        assert monitor.latest[""]["mask_entropy"] == pytest.approx(1)


def test_every_layer_is_measured() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v3, self.v4 = dk.nn.DCNv3(16, group=2), dk.nn.DCNv4(16, group=2, dw_kernel_size=3)
            self.pool = dk.nn.PackedDeformRoIPool(3, output_channels=16, deform_fc_channels=8)

        def forward(self, input: Tensor, rois: Tensor) -> Tensor:
            return self.pool(self.v4(self.v3(self.v3(input))).movedim(-1, 1), rois)

    model = Both()
    with dk.monitor(model) as monitor:
        model(torch.randn(1, 8, 9, 16), torch.tensor([[0, 0.0, 0, 6, 7], [0, 2, 2, 5, 4]]))
    assert list(monitor.latest) == ["v3", "v3#2", "v4", "pool", "pool#2"]
    assert monitor.latest["pool"]["offset_max"] == 0 and "mask_entropy" not in monitor.latest["pool"]
    assert all(value == value for found in monitor.latest.values() for value in found.values())


@pytest.mark.parametrize("inside", [False, True])
def test_a_layer_of_transformers(inside: bool) -> None:
    layer, arguments = attention("deformable_detr")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, **arguments: Any) -> Any:
            return self.layer(**arguments)

    model = Model() if inside else layer
    cls, before = type(layer), model(**arguments)[0]
    with dk.monitor(model) as monitor:
        output = model(**arguments)[0]
    torch.testing.assert_close(output, before)
    assert list(monitor.latest) == ["layer.attn" if inside else "attn"] and type(layer) is cls
    assert names(model, dk.param_groups(model, 0.1)[1]) == {"layer.sampling_offsets" if inside else "sampling_offsets"}


def test_a_layer_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    host = stand_ins.install(monkeypatch, "torchvision.ops.deform_conv", "torchvision.ops")
    layer = host.DeformConv2d(4, 6, 3, padding=1)
    with dk.monitor(layer) as monitor:
        layer(torch.randn(2, 4, 7, 8), torch.full((2, 18, 7, 8), 0.5))
    assert monitor.latest[""]["offset_mean"] == pytest.approx(0.5**0.5)


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"model is a list; it must be a torch\.nn\.Module"):
        dk.monitor([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="writer is a str; it must have a method add_scalar"):
        dk.monitor(network(), "runs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every is 0"):
        dk.monitor(network(), every=0)


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name.rpartition(".")[0] for name, p in model.named_parameters() if id(p) in chosen}


def test_param_groups() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 3, 1),
            "packed": dk.nn.PackedDeformConv1d(3, 3, 3),
            "attention": dk.nn.MSDeformAttn(16, 2, 2),
            "v3": dk.nn.DCNv3(16, group=2),
            "v4": dk.nn.DCNv4(16, group=2),
        }
    )
    model["plain"].bias.requires_grad_(False)
    others, offsets = dk.param_groups(model, 0.5, 0.01)
    assert (others["lr"], offsets["lr"]) == (0.5, 0.005)
    assert names(model, offsets) == {
        "packed.offset_head",
        "attention.sampling_offsets",
        "v3.offset",
        "v4.offset_mask",
    }
    learned = sum(p.requires_grad for p in model.parameters())
    assert len(others["params"]) + len(offsets["params"]) == learned < len(list(model.parameters()))
    torch.optim.SGD([others, offsets])


def test_param_groups_of_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no layer that predicts offsets"):
        dk.param_groups(nn.Sequential(dk.nn.DeformConv2d(3, 3, 3)), 0.1)
    with pytest.raises(ValueError, match="lr is -1"):
        dk.param_groups(network(), -1)
    with pytest.raises(ValueError, match=r"offset_lr_mult is -0\.1"):
        dk.param_groups(network(), 0.1, -0.1)
