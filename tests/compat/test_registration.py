"""compat.monai.Warp and compat.voxelmorph.SpatialTransformer: the formulas of these libraries, by grid_sample."""

import published
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.compat import monai, voxelmorph


def compare(layer: torch.nn.Module, theirs: object, tensors: list[Tensor]) -> None:
    """Compare the value and both gradients."""
    results = [evaluate(function, tensors, [0, 1], torch.float64) for function in (layer, theirs)]
    for pair in zip(*results, strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(
    ("size", "mode"),
    [(size, mode) for size in ((5, 6), (1, 7), (4, 3, 5)) for mode in ("bilinear", "nearest", "bicubic")][:-1],
)
def test_warp_of_monai(size: tuple[int, ...], mode: str, padding_mode: str) -> None:
    tensors = [torch.randn(2, 3, *size).double(), 3 * torch.randn(2, len(size), *size).double()]
    layer = monai.Warp(mode, padding_mode)

    def theirs(image: Tensor, ddf: Tensor) -> Tensor:
        return F.grid_sample(image, published.normalised(ddf), mode, padding_mode, align_corners=True)

    compare(layer, theirs, tensors)


def test_warp_of_monai_with_jitter() -> None:
    image, ddf = torch.randn(2, 1, 5, 6), torch.zeros(2, 2, 5, 6)
    state = torch.get_rng_state()
    layer = monai.Warp(jitter=True)
    first = layer(image, ddf)
    assert_equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert_close(monai.Warp()(image, torch.rand(2, 2, 5, 6)), first.double())


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (4, 3, 5)])
def test_spatial_transformer_of_voxelmorph(size: tuple[int, ...], mode: str, align_corners: bool) -> None:
    tensors = [torch.randn(2, 3, *size).double(), 3 * torch.randn(2, len(size), *size).double()]
    layer = voxelmorph.SpatialTransformer(mode, align_corners)

    def theirs(image: Tensor, field: Tensor) -> Tensor:
        how = "nearest" if mode == "nearest" else "bilinear"
        return F.grid_sample(image, published.normalised(field), how, align_corners=align_corners)

    compare(layer, theirs, tensors)


def test_labels_keep_their_dtype() -> None:
    labels, field = torch.randint(0, 5, (1, 1, 4, 5)), torch.zeros(1, 2, 4, 5)
    assert_equal(voxelmorph.SpatialTransformer("nearest")(labels, field), labels)
    assert voxelmorph.SpatialTransformer()(labels, field).dtype == torch.float32


def test_errors() -> None:
    image = torch.zeros(1, 1, 4, 5)
    with pytest.raises(ValueError, match=r"ddf has shape \[1, 2, 5, 4\]; with image of shape .* \[1, 2, 4, 5\]"):
        monai.Warp()(image, torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match="deformation_field has shape"):
        voxelmorph.SpatialTransformer()(image, torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="interpolation_mode is 'bilinear'"):
        voxelmorph.SpatialTransformer("bilinear")
    with pytest.raises(ValueError, match="padding_mode is 'edge'"):
        monai.Warp(padding_mode="edge")
