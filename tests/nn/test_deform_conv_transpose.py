"""The layers of the transposed deformable convolution beside torch.nn.ConvTransposeNd."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal

PLAIN = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
GIVEN = {1: dk.nn.DeformConvTranspose1d, 2: dk.nn.DeformConvTranspose2d, 3: dk.nn.DeformConvTranspose3d}
PACKED = {
    1: dk.nn.PackedDeformConvTranspose1d,
    2: dk.nn.PackedDeformConvTranspose2d,
    3: dk.nn.PackedDeformConvTranspose3d,
}
WINDOWS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 3, "dilation": 2, "groups": 2, "bias": False},
    {"dilation": 3, "output_padding": 2},
]


def image(axes: int, **options: Any) -> Tensor:
    return torch.randn(2, 4, *(4, 3, 3)[:axes], **options)


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: "-".join(window) or "default")
def test_zero_offsets_give_the_plain_layer(axes: int, window: dict[str, Any]) -> None:
    plain, layer = PLAIN[axes](4, 6, 3, **window).double(), GIVEN[axes](4, 6, 3, **window, offset_groups=2).double()
    layer.load_state_dict(plain.state_dict(), strict=True)
    input = image(axes, dtype=torch.float64)
    offset = input.new_zeros(2, 2 * 3**axes * axes, *input.shape[2:])
    expected = plain(input)
    assert_close(layer(input, offset), expected)
    assert_close(layer(input, offset, torch.ones_like(offset[:, : 2 * 3**axes])), expected)
    assert_close(layer(input[0], offset[0]), expected[0])


@pytest.mark.parametrize("modulated", [False, True])
def test_a_new_packed_layer_is_the_plain_layer(axes: int, modulated: bool) -> None:
    torch.manual_seed(3)
    plain = PLAIN[axes](4, 6, 3, stride=2)
    after = torch.rand(())
    torch.manual_seed(3)
    layer = PACKED[axes](4, 6, 3, stride=2, modulated=modulated, offset_groups=2)
    assert_equal(torch.rand(()), after, "random stream after the layer")
    assert_equal(layer.weight, plain.weight)
    input = image(axes)
    assert_close(layer(input), plain.double()(input.double()))


def test_packed_is_the_given_layer_at_its_prediction(axes: int) -> None:
    options = {"stride": 2, "padding": 1, "groups": 2, "offset_groups": 3, "boundary": "border"}
    layer, given = PACKED[axes](4, 6, 3, modulated=True, **options), GIVEN[axes](4, 6, 3, **options)
    nn.init.normal_(layer.offset_head.weight, std=0.1)
    given.load_state_dict(layer.state_dict(), strict=False)
    input = image(axes)
    offset, mask = layer.predict(input)
    assert mask is not None and 0 < mask.min() < mask.max() < 2
    assert offset.shape == (2, 3 * 3**axes * axes, *input.shape[2:]) and mask.shape[1] == 3 * 3**axes
    output = layer(input)
    assert_equal(output, given(input, offset, mask))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other(input), output)
    layer.reset_parameters()
    assert not layer.offset_head.weight.any()


def test_output_size(axes: int) -> None:
    """A stride has several sizes that it comes from: torch's layers take the one that is wanted."""
    plain, layer = PLAIN[axes](4, 6, 3, stride=3), PACKED[axes](4, 6, 3, stride=3)
    layer.load_state_dict(plain.state_dict(), strict=False)
    input = image(axes)
    size = [n + 2 for n in plain(input).shape[2:]]
    expected = plain.double()(input.double(), output_size=size)
    assert list(expected.shape[2:]) == size
    assert_close(layer(input, size), expected)
    assert_close(layer(input, [2, 6, *size]), expected)
    assert_close(layer(input[0], [6, *size]), expected[0])
    with pytest.raises(ValueError, match="requested an output size"):
        layer(input, [n + 1 for n in size])


def test_arguments_are_those_of_torch(axes: int) -> None:
    theirs = list(inspect.signature(PLAIN[axes]).parameters)
    for layer, own in ((GIVEN[axes], []), (PACKED[axes], ["modulated"])):
        assert list(inspect.signature(layer).parameters) == [*theirs, *own, "offset_groups", "boundary"]
    layer = GIVEN[axes](4, 6, 3, output_padding=1, stride=2, offset_groups=2, boundary="border")
    assert "offset_groups=2, boundary=border" in repr(layer) and "output_padding=" in repr(layer)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "offset groups": ({"offset_groups": 4}, ValueError, "out_channels is 6; it must be divisible by offset_groups"),
    "padding mode": ({"padding_mode": "reflect"}, ValueError, "padding_mode is 'reflect'; it must be one of 'zeros'"),
    "a name elsewhere": ({"deform_groups": 2}, TypeError, "has no argument 'deform_groups'; it is called"),
    "stride": ({"stride": 0}, ValueError, "stride is 0; each value must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, error, message = WRONG[name]
    for layer in (GIVEN[2], PACKED[2]):
        with pytest.raises(error, match=message):
            layer(4, 6, 3, **change)


def test_wrong_tensors() -> None:
    layer = GIVEN[2](4, 6, 3)
    with pytest.raises(ValueError, match="input has 5 channels; this layer has in_channels=4"):
        layer(torch.zeros(2, 5, 4, 3), torch.zeros(2, 18, 4, 3))
    with pytest.raises(ValueError, match="offset has 16 channels; a 3x3 kernel with 1 offset group needs 18"):
        layer(torch.zeros(2, 4, 4, 3), torch.zeros(2, 16, 4, 3))
