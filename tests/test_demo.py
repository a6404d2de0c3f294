"""The demonstration, with few steps."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from deformkit import demo
from deformkit._testing import assert_close, assert_equal
from deformkit.nn import PackedDeformConv2d

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")


def test_both_networks_are_trained_and_a_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "look.png"
    results = demo.main(seeds=2, steps=3, out=out)
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for plain, deformable in results:
        assert (plain.name, deformable.name) == ("plain", "deformable")
        assert len(plain.losses) == len(deformable.losses) == 3
        # With the same images, order and weights, and zero offsets, the first steps are equal.
        assert deformable.losses[0] == pytest.approx(plain.losses[0], rel=1e-4)
        for result in (plain, deformable):
            assert f"{100 * result.accuracy:.1f} %" in printed
            assert f"{result.parameters:,}" in printed
    again = demo.main(seeds=1, steps=3, out=out)
    assert [r.losses for r in again[0]] == [r.losses for r in results[0]]
    assert [r.accuracy for r in again[0]] == [r.accuracy for r in results[0]]


def test_no_image_is_in_both_halves() -> None:
    from sklearn.datasets import load_digits

    data = demo.load_digits(0)
    total = len(load_digits().target)
    assert len(data.train_images) + len(data.test_images) // demo.TEST_WARPS == total
    assert len(data.test_labels) == len(data.test_images) and data.test_images.shape[1:] == (
        1,
        demo.CANVAS,
        demo.CANVAS,
    )
    assert_equal(data.test_images, demo.load_digits(0).test_images)
    assert not torch.equal(data.train_labels, demo.load_digits(1).train_labels)


def test_the_networks_differ_by_their_deformable_layers_only() -> None:
    torch.manual_seed(0)
    plain = demo.network(deformable=False)
    torch.manual_seed(0)
    deformable = demo.network(deformable=True)
    heads = sum(p.numel() for m in deformable if isinstance(m, PackedDeformConv2d) for p in m.offset_head.parameters())
    count = [sum(p.numel() for p in model.parameters()) for model in (plain, deformable)]
    assert heads > 0 and count[1] - count[0] == heads
    images = torch.randn(2, 1, demo.CANVAS, demo.CANVAS)
    assert_close(deformable(images), plain.double()(images.double()))


def test_look_at_zero_offsets_is_where_plain_layers_look() -> None:
    model = demo.network(deformable=True)
    seen = demo.look(model, torch.rand(1, demo.CANVAS, demo.CANVAS), 7)
    assert seen.points.shape == (9**3, 2) and seen.label == 7
    assert_equal(seen.points, seen.undeformed)
    assert_equal(seen.weights, torch.ones(9**3))
    # One tap is four pixels of the image in the last layer, and two in the layers before it.
    offsets = seen.points - seen.position
    assert offsets.abs().max() == 4 + 2 + 2
    assert_equal(offsets[0], torch.tensor([-8.0, -8.0]))


def test_look_follows_a_constant_offset() -> None:
    model = demo.network(deformable=True)
    layers = [module for module in model if isinstance(module, PackedDeformConv2d)]
    image = torch.rand(1, demo.CANVAS, demo.CANVAS)
    # The size of a pixel of each layer's input, in pixels of the image.
    for layer, pixel in zip(layers, (2, 2, 4), strict=True):
        with torch.no_grad():
            layer.offset_head.bias[0:18:2] = 0.5
            layer.offset_head.bias[18:] = math.log(3)
        seen = demo.look(model, image, 0)
        moved = seen.points - seen.undeformed
        assert_close(moved, torch.tensor([0.5 * pixel, 0.0]).expand(9**3, 2).double())
        assert_close(seen.weights, torch.full((9**3,), 1.5).double())
        with torch.no_grad():
            nn.init.zeros_(layer.offset_head.bias)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(SystemExit, match=r"the demo needs scikit-learn; pip install 'deformkit\[demo\]'"):
        demo.main()


@pytest.mark.parametrize(
    "wrong", [{"seeds": 0}, {"epochs": 0}, {"steps": 0}, {"out": "a.txt"}, {"out": "no/folder/a.png"}]
)
def test_wrong_arguments(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        demo.main(**wrong)  # type: ignore[arg-type]
