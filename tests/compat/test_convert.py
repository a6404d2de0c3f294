"""Converted state-dicts: the converted layer computes the same as the published one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal
from deformkit.compat import convert, mmcv, torchvision

PACKS = {"DCN": mmcv.DeformConv2dPack, "DCNv2": mmcv.ModulatedDeformConv2dPack}
packs = pytest.mark.parametrize("pack", PACKS)
WINDOW: tuple[Any, ...] = (8, 6, (3, 2), (1, 2), (2, 1), (2, 1), 2)


def published(pack: str, groups: int = 2) -> nn.Module:
    layer = PACKS[pack](*WINDOW, groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.double()


def ours(pack: str, groups: int = 2) -> nn.Module:
    options = {"modulated": pack == "DCNv2", "bias": pack == "DCNv2", "offset_groups": groups}
    return dk.nn.PackedDeformConv2d(*WINDOW, **options).double()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_equal(value, other[name], name)


@packs
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mmcv(pack: str, groups: int) -> None:
    theirs, layer = published(pack, groups), ours(pack, groups)
    state = convert.from_mmcv(theirs.state_dict(), modulated=pack == "DCNv2")
    layer.load_state_dict(state)
    x = torch.randn(2, 8, 7, 8).double()
    assert_close(layer(x).detach(), theirs(x).detach())
    assert_same(convert.to_mmcv(state, modulated=pack == "DCNv2"), theirs.state_dict())


@packs
@pytest.mark.parametrize("head", ["conv2.conv_offset", "conv2.conv_offset_mask", "conv2_offset"])
def test_mmcv_within_a_network_and_by_older_names(pack: str, head: str) -> None:
    """In DCNv2, and in mmcv before version 2, the head has another name; the other names are equal."""
    network = nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "conv2": published(pack)})
    state = {name.replace("conv2.conv_offset", head): value for name, value in network.state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    converted = convert.from_mmcv(state, modulated=pack == "DCNv2", prefix="conv2.")
    assert_same(state, before)
    alone = convert.from_mmcv(network["conv2"].state_dict(), modulated=pack == "DCNv2")
    rest = {name: value for name, value in state.items() if name.startswith("conv1.")}
    assert len(rest) == 2
    assert_same(converted, {**rest, **{f"conv2.{name}": value for name, value in alone.items()}})


@packs
def test_half_weights_are_not_rounded(pack: str) -> None:
    state = published(pack).half().state_dict()
    once = convert.from_mmcv(state, modulated=pack == "DCNv2")
    assert_same(convert.to_mmcv(once, modulated=pack == "DCNv2"), state)


class ByHand(nn.Module):
    """Many programs pack torchvision's function like this, with one plain convolution for each prediction."""

    def __init__(self, modulated: bool, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.offset_conv = nn.Conv2d(4, 36, 3, 1, 1)
        self.mask_conv = nn.Conv2d(4, 18, 3, 1, 1) if modulated else None
        self.regular_conv = nn.Conv2d(4, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask_conv is None else self.factor * self.mask_conv(x).sigmoid()
        conv = self.regular_conv
        return dk.deform_conv2d(x, self.offset_conv(x), conv.weight, conv.bias, 1, 1, 1, mask)


@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 1.0), (True, 2.0)])
def test_torchvision_packed_by_hand(modulated: bool, factor: float) -> None:
    network = nn.ModuleDict({"a": ByHand(modulated, factor).double(), "b": nn.Linear(2, 2)})
    mask = {"mask": "mask_conv", "mask_factor": factor} if modulated else {}
    names = {"conv": "regular_conv", "offset": "offset_conv", **mask}
    state = convert.from_torchvision(network.state_dict(), **names, prefix="a.")
    packed = dk.nn.PackedDeformConv2d(4, 6, 3, padding=1, modulated=modulated, offset_groups=2).double()
    nn.ModuleDict({"a": packed, "b": nn.Linear(2, 2)}).load_state_dict(state)
    x = torch.randn(2, 4, 5, 6).double()
    assert_close(packed(x).detach(), network["a"](x).detach())


def test_torchvision_layers_need_no_conversion() -> None:
    theirs, layer = torchvision.DeformConv2d(8, 6, 3), dk.nn.DeformConv2d(8, 6, 3)
    layer.load_state_dict(theirs.state_dict())
    input, offset = torch.randn(1, 8, 4, 5), torch.randn(1, 18, 2, 3)
    assert_equal(layer(input, offset), theirs(input, offset))


def test_only_heads_are_renamed() -> None:
    weight, other = torch.zeros(4, 4, 3, 3), torch.zeros(4)
    state = {"bn.weight": other, "bn_offset.weight": other, "a.weight": weight, "a.conv_offset.weight": weight}
    state |= {"a_offset.bias": other, "b_offset.weight": weight}
    renamed = convert.rename_offset_heads(state)
    assert list(renamed) == [*list(state)[:4], "a.conv_offset.bias", "b_offset.weight"]


@packs
def test_errors(pack: str) -> None:
    modulated, state = pack == "DCNv2", published(pack, 1).state_dict()
    with pytest.raises(ValueError, match=r"there is no entry 'x\.weight'"):
        convert.from_mmcv(state, modulated=modulated, prefix="x.")
    with pytest.raises(ValueError, match=r"there is no entry 'offset_head\.weight'"):
        convert.to_mmcv(state, modulated=modulated)
    rows, multiple = (18, 12) if modulated else (12, 18)
    with pytest.raises(ValueError, match=f"conv_offset.weight has {rows} rows; .* a multiple of {multiple}"):
        convert.from_mmcv(state, modulated=not modulated)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (17, "mask_conv.weight has 17 rows; with a 3x3 kernel it needs a multiple of 9"),
        (9, "mask_conv has 9 channels; beside 36 offsets it needs 18"),
    ],
)
def test_heads_that_do_not_fit(rows: int, message: str) -> None:
    state = ByHand(True, 1.0).state_dict()
    state = {name: value[:rows] if name.startswith("mask") else value for name, value in state.items()}
    with pytest.raises(ValueError, match=message):
        convert.from_torchvision(state, conv="regular_conv", offset="offset_conv", mask="mask_conv")
