"""compat.deformable_attention: the formula of the package deformable-attention, written out with grid_sample."""

from typing import Any

import published
import pytest
import torch
from torch import nn

from deformkit._testing import assert_close
from deformkit.compat import deformable_attention as compat

LAYERS: dict[int, Any] = {
    1: compat.DeformableAttention1D,
    2: compat.DeformableAttention2D,
    3: compat.DeformableAttention3D,
}
SIZES = {1: (17,), 2: (9, 14), 3: (5, 8, 9)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"offset_groups": 2, "group_queries": False, "offset_scale": 1.5},
    {"group_key_values": False, "downsample_factor": 3, "offset_kernel_size": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "groups", "keys"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_formula(axes: int, options: dict[str, Any]) -> None:
    """The output and the gradients of the input and of every parameter."""
    layer = LAYERS[axes](dim=16, dim_head=4, heads=4, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, *SIZES[axes]).double().requires_grad_()
    output, vgrid = layer(x, return_vgrid=True)
    vgrid = vgrid.unsqueeze(1) if axes == 1 else vgrid
    grouped = layer.to_q(x).unflatten(1, (layer.offset_groups, -1)).flatten(0, 1)
    still = torch.meshgrid(*(torch.arange(n).to(x) for n in vgrid.shape[2:]), indexing="ij")
    moved = layer.to_offsets(grouped) + torch.stack(still[::-1] if axes == 2 else still)
    assert_close(vgrid.detach(), moved.detach())
    expected = published.deformable_attention(layer, x, moved)
    weight = torch.randn_like(expected)
    # A softmax does not change with a number added to all its arguments: the last bias has no gradient but rounding.
    given = [x, *(value for name, value in layer.named_parameters() if name != "rel_pos_bias.mlp.2.bias")]
    grads, theirs = (
        torch.autograd.grad((value * weight).sum(), given, retain_graph=True) for value in (output, expected)
    )
    assert_close(output.detach(), expected.detach())
    for ours, other in zip(grads, theirs, strict=True):
        assert_close(ours, other)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_state_dict(axes: int) -> None:
    """The names of the package; that of volumes contains the scale."""
    names = {f"to_{part}.weight" for part in ("q", "k", "v", "out")} | {"to_out.bias"}
    names |= {"to_offsets.0.weight", "to_offsets.0.bias", "to_offsets.2.weight"}
    names |= {f"rel_pos_bias.mlp.{part}.{kind}" for part in ("0.0", "1.0", "2") for kind in ("weight", "bias")}
    assert set(LAYERS[axes](dim=16).state_dict()) == names | ({"to_offsets.4.scale"} if axes == 3 else set())


def test_distances_without_logarithm() -> None:
    layer = compat.DeformableAttention1D(dim=8, dim_head=4, heads=2, cpb_log_distance=False)
    x = torch.randn(1, 8, 16)
    output, vgrid = layer(x, return_vgrid=True)
    assert_close(
        output.detach(),
        published.deformable_attention(layer.double(), x.double(), vgrid.double().unsqueeze(1)).detach(),
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match="offset_kernel_size is 5x5; it must be larger than downsample_factor, 4x4"):
        compat.DeformableAttention2D(dim=16, offset_kernel_size=5)
    with pytest.raises(ValueError, match="heads is 8; it must be divisible by offset_groups, which is 3"):
        compat.DeformableAttention1D(dim=16, offset_groups=3)
    with pytest.raises(ValueError, match="x has 8 channels; this layer has dim=16"):
        compat.DeformableAttention2D(dim=16)(torch.zeros(1, 8, 16, 16))
