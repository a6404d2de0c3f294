"""State-dicts of published layers are permuted and permuted back. test_dcn.py verifies what they compute."""

from typing import Any

import pytest
import torch
from torch import nn

import deformkit as dk
from deformkit._testing import assert_equal

LAYERS = {"DCNv3": dk.nn.DCNv3, "DCNv4": dk.nn.DCNv4}
CONVERT = {"DCNv3": dk.nn.dcnv3_state_dict, "DCNv4": dk.nn.dcnv4_state_dict}
both = pytest.mark.parametrize("name", LAYERS)


def build(name: str, *args: Any, **options: Any) -> nn.Module:
    """A layer all of whose parameters are random."""
    layer = LAYERS[name](*args, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_a_converted_tap_reads_where_the_published_one_did() -> None:
    """The published tap 1 is below tap 0, and its first coordinate is x."""
    layer = dk.nn.DCNv3(4, group=1)
    published = layer.state_dict()
    published["offset.bias"][2:4] = torch.tensor([0.25, 0.5])  # x and y of tap 1
    layer.load_state_dict(dk.nn.dcnv3_state_dict(published, kernel_size=3, group=1))
    points = layer.sampling_locations(layer.predict(torch.zeros(1, 5, 6, 4))[0])[0, 2, 3, 0]
    plain = dk.nn.DCNv3(4, group=1)
    moved = points - plain.sampling_locations(plain.predict(torch.zeros(1, 5, 6, 4))[0])[0, 2, 3, 0]
    expected = torch.zeros(9, 2)
    expected[3] = torch.tensor([0.5, 0.25])  # row 1, column 0
    assert_equal(moved, expected)


@both
@pytest.mark.parametrize(("kernel_size", "remove_center"), [(2, False), (3, False), (5, False), (3, True), (5, True)])
def test_a_conversion_undoes_itself(name: str, kernel_size: int, remove_center: bool) -> None:
    options = {"kernel_size": kernel_size, "group": 3, "remove_center": remove_center}
    state = build(name, 9, dw_kernel_size=3, **options).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    once = CONVERT[name](state, **options)
    twice = CONVERT[name](once, **options)
    assert state.keys() == once.keys() == twice.keys()
    for key, value in state.items():
        assert_equal(value, before[key], f"{key}, which was given")
        assert_equal(twice[key], value, key)


@both
def test_a_conversion_within_a_network(name: str) -> None:
    network = nn.ModuleDict({"a": build(name, 8, group=4), "b": build(name, 8, group=2)})
    state = network.state_dict()
    converted = CONVERT[name](state, kernel_size=(3, 3), group=2, prefix="b.")
    alone = CONVERT[name](network["b"].state_dict(), kernel_size=3, group=2)
    for key, value in converted.items():
        assert_equal(value, alone[key[2:]] if key.startswith("b.") else state[key], key)


@both
def test_what_cannot_be_converted(name: str) -> None:
    head = {"DCNv3": "offset", "DCNv4": "offset_mask"}[name]
    state = build(name, 8, group=4).state_dict()
    with pytest.raises(ValueError, match=f"published has no entry 'x.{head}.weight'"):
        CONVERT[name](state, kernel_size=3, group=4, prefix="x.")
    with pytest.raises(ValueError, match=rf"{head}.weight has \d+ rows; with group=2 it needs \d+"):
        CONVERT[name](state, kernel_size=3, group=2)
    with pytest.raises(ValueError, match="kernel_size is 3x5; the published layers have square kernels"):
        CONVERT[name](state, kernel_size=(3, 5), group=4)
