"""Names of tvdcn 1.1.0: its signatures, its maps and its state-dicts, on our operators."""

import inspect
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, assert_equal
from deformkit.compat import tvdcn

# Of the published wheel, read with inspect.
GIVEN = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
END = ["padding_mode", "device", "dtype"]
HEADS = ["generator_bias", "deformable", "modulated", "offset_activation", "mask_activation"]
SIGNATURES = {
    "deform_conv{}d": ["input", "weight", "offset", "mask", "bias", "stride", "padding", "dilation", "groups"],
    "deform_conv_transpose{}d": [
        *("input", "weight", "offset", "mask", "bias"),
        *("stride", "padding", "output_padding", "dilation", "groups"),
    ],
    "DeformConv{}d": [*GIVEN, "groups", "bias", *END],
    "DeformConvTranspose{}d": [*GIVEN, "output_padding", "groups", "bias", *END],
    "PackedDeformConv{}d": [*GIVEN, "groups", "offset_groups", "mask_groups", "bias", *HEADS, *END],
    "PackedDeformConvTranspose{}d": [
        *(*GIVEN, "output_padding", "groups", "offset_groups", "mask_groups", "bias"),
        *(*HEADS, *END),
    ],
}


def maps(axes: int, transposed: bool, offset_groups: int = 2, mask_groups: int = 2) -> dict[str, Any]:
    """A call by name: 6 channels to 6 in 2 groups, kernel 3, stride 2."""
    size = (7, 6, 5)[:axes]
    out = size if transposed else [(n - 1) // 2 for n in size]
    taps = 3**axes
    return {
        "input": torch.randn(2, 6, *size),
        "weight": torch.randn(6, 3, *[3] * axes),
        "offset": torch.randn(2, offset_groups * taps * axes, *out),
        "mask": torch.rand(2, mask_groups * taps, *out),
        "bias": torch.randn(6),
        "stride": 2,
        "groups": 2,
    }


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str, axes: int) -> None:
    found = inspect.signature(getattr(tvdcn, name.format(axes))).parameters
    assert [parameter for parameter in found if parameter not in ("args", "kwargs")][: len(SIGNATURES[name])] == (
        SIGNATURES[name]
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_values(axes: int, transposed: bool) -> None:
    name = f"deform_conv_transpose{axes}d" if transposed else f"deform_conv{axes}d"
    named = maps(axes, transposed)
    result = getattr(tvdcn, name)(**named)
    ours = {k: v for k, v in named.items() if transposed or k != "groups"}
    assert_equal(result, getattr(dk, name)(**ours))
    alone = {k: v[0] if k in ("input", "offset", "mask") else v for k, v in named.items()}
    assert_close(getattr(tvdcn, name)(**alone), result[0].double())

    plain = getattr(F, name.removeprefix("deform_"))
    expected = plain(named["input"], named["weight"], named["bias"], stride=2, groups=2)
    without = {k: v for k, v in named.items() if k not in ("offset", "mask")}
    assert_close(getattr(tvdcn, name)(**without), expected.double())


@pytest.mark.parametrize("transposed", [False, True])
def test_as_many_mask_groups_as_one_likes(axes: int, transposed: bool) -> None:
    name = f"deform_conv_transpose{axes}d" if transposed else f"deform_conv{axes}d"
    named, taps = maps(axes, transposed, offset_groups=2, mask_groups=3), 3**axes
    offset, mask = named["offset"].unflatten(1, (2, -1)), named["mask"].unflatten(1, (3, -1))
    each = dict(
        named, offset=offset[:, [0, 0, 0, 1, 1, 1]].flatten(1, 2), mask=mask[:, [0, 0, 1, 1, 2, 2]].flatten(1, 2)
    )
    assert each["mask"].shape[1] == 6 * taps
    assert_equal(getattr(tvdcn, name)(**named), getattr(tvdcn, name)(**each))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", torch.tanh, None])
def test_packed_layers(axes: int, transposed: bool, activation: Any) -> None:
    kind = "ConvTranspose" if transposed else "Conv"
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    packed = getattr(tvdcn, f"PackedDeform{kind}{axes}d")(
        6,
        6,
        3,
        **options,
        offset_groups=2,
        mask_groups=3,
        generator_bias=True,
        modulated=True,
        mask_activation=activation,
    )
    assert set(packed.state_dict()) == {
        f"{part}{leaf}" for part in ("", "offset_generator.", "mask_generator.") for leaf in ("weight", "bias")
    }
    input = torch.randn(2, 6, *(7, 6, 5)[:axes])
    if activation == "sigmoid":
        plain = getattr(torch.nn, f"{kind}{axes}d")(6, 6, 3, **options)
        packed.load_state_dict(plain.state_dict(), strict=False)
        assert_close(packed(input), plain.double()(input.double()))
    for head in (packed.offset_generator, packed.mask_generator):
        torch.nn.init.normal_(head.weight)
    given = getattr(tvdcn, f"Deform{kind}{axes}d")(6, 6, 3, **options)
    given.load_state_dict(packed.state_dict(), strict=False)
    offset, logit = packed.offset_generator(input), packed.mask_generator(input)
    taps = logit.unflatten(1, (3, -1))
    mask = {
        "sigmoid": lambda: 2 * logit.sigmoid(),
        "softmax": lambda: taps.softmax(2).flatten(1, 2),
        torch.tanh: lambda: logit.tanh(),
        None: lambda: logit,
    }[activation]()
    assert_equal(packed(input), given(input, offset, mask))
    if transposed:
        size = [n + 1 for n in packed(input).shape[2:]]
        assert list(packed(input, size).shape[2:]) == size


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="out_channels is 4; it must be divisible by mask_groups, 3"):
        tvdcn.PackedDeformConv2d(6, 4, 3, mask_groups=3)
    with pytest.raises(ValueError, match="mask_activation is 'relu'"):
        tvdcn.PackedDeformConvTranspose1d(6, 6, 3, mask_activation="relu")
    named = maps(2, False)
    with pytest.raises(ValueError, match=r"groups is 3; input of shape .* need 2"):
        tvdcn.deform_conv2d(**{**named, "groups": 3})
    with pytest.raises(ValueError, match="offset has 35 channels"):
        tvdcn.deform_conv2d(**{**named, "offset": named["offset"][:, 1:]})
