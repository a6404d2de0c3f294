"""The figures show the positions that the layer samples."""

from typing import Any

import pytest
import torch
from torch import nn

import deformkit as dk
from deformkit import viz

pytest.importorskip("matplotlib")


def packed(axes: int) -> tuple[nn.Module, torch.Tensor]:
    layer = getattr(dk.nn, f"PackedDeformConv{axes}d")(1, 4, 3, padding=1, modulated=True, offset_groups=1)
    nn.init.normal_(layer.offset_head.weight, std=0.4)
    return layer, torch.rand(1, 1, *(7, 9, 11)[-axes:])


def test_samples_are_drawn_where_they_are(axes: int, tmp_path: Any) -> None:
    found = viz.sampling(*packed(axes))
    at = (3, 2, 4)[-axes:]
    figure = found.plot("position", at=at)
    positions = found[0].positions[(0, *at)].flatten(0, 1)
    planes = {1: [(0,)], 2: [(0, 1)], 3: [(1, 2), (0, 2), (0, 1)]}[axes]
    for panel, plane in zip(figure.axes, planes, strict=True):
        drawn = torch.tensor(panel.collections[0].get_offsets().tolist())
        torch.testing.assert_close(drawn[:, 0], positions[:, plane[-1]], check_dtype=False)
        if axes > 1:
            torch.testing.assert_close(drawn[:, 1], positions[:, plane[0]], check_dtype=False)
    for what in ("offsets", "attention", "receptive_field"):
        found.plot(what, at=at).savefig(tmp_path / f"{what}.png")


def test_attention_has_a_panel_for_each_level_and_head() -> None:
    sizes = [(6, 8), (3, 4)]
    layer = dk.nn.MSDeformAttn(16, n_levels=2, n_heads=2, n_points=[3, 2])
    features = torch.randn(1, 60, 16)
    found = viz.sampling(layer, features, torch.rand(1, 60, 2, 2), features, sizes)
    image = torch.rand(3, 48, 64)
    *panels, bar = found.plot("attention", at=20, image=image).axes
    assert len(panels) == 4 and bar.get_ylabel() == "weight"
    expected, weights = found[0].on((48, 64))[0, 20], found[0].weights[0, 20]
    for panel, (level, head) in zip(panels, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        (scatter,) = panel.collections
        chosen = found[0].levels == level
        drawn = torch.tensor(scatter.get_offsets().tolist())
        torch.testing.assert_close(drawn, expected[head, chosen].flip(-1), check_dtype=False)
        torch.testing.assert_close(torch.tensor(scatter.get_array().tolist()), weights[head, chosen])


def test_short_arrows_are_drawn_longer_and_the_title_says_so() -> None:
    layer, _ = packed(2)
    nn.init.zeros_(layer.offset_head.weight)
    layer.offset_head.bias.data[0:18:2] = 0.0625
    found = viz.sampling(layer, torch.rand(1, 1, 60, 60))
    figure = found.plot("offsets")
    (quiver,) = figure.axes[0].collections
    assert figure.get_suptitle().endswith("32 times as long")
    assert quiver.V.max() == pytest.approx(32 * 0.0625, rel=1e-3)
