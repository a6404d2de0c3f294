"""Arguments under the names that other libraries give them."""

import inspect

import pytest

import deformkit as dk

ELSEWHERE = {
    "DCNv3": {"padding": "pad", "groups": "group", "num_heads": "group", "in_channels": "channels"},
    "DCNv4": {"padding": "pad", "groups": "group", "dim": "channels"},
    "MSDeformAttn": {
        "embed_dims": "d_model",
        "num_levels": "n_levels",
        "num_heads": "n_heads",
        "num_points": "n_points",
    },
    "DeformRoIPool": {"out_size": "output_size", "trans_std": "gamma"},
    "PackedDeformRoIPool": {"out_channels": "output_channels"},
}


@pytest.mark.parametrize("layer", ELSEWHERE)
def test_the_name_that_an_argument_has_elsewhere_gets_a_hint(layer: str) -> None:
    for theirs, ours in ELSEWHERE[layer].items():
        with pytest.raises(TypeError, match=f"^{layer} has no argument '{theirs}'; it is called '{ours}' here"):
            getattr(dk.nn, layer)(**{theirs: 1})
        assert ours in inspect.signature(getattr(dk.nn, layer)).parameters


def test_a_subclass_of_a_layer_gets_the_hint_for_the_layer() -> None:
    class Block(dk.nn.DCNv4):
        pass

    with pytest.raises(TypeError, match=r"^DCNv4 has no argument 'padding'"):
        Block(64, padding=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        Block(64, colour=1)  # type: ignore[call-arg]
