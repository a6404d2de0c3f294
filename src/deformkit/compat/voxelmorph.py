"""VoxelMorph: the layer that warps an image by a displacement field."""

from typing import Any

import torch
from torch import Tensor, nn

from ..nn._field import check_field, positions
from ..ops._shape import check_alike, check_choice, check_floating, check_tensor, compute_dtype
from ._grid_sample import sample_pixels

__all__ = ["SpatialTransformer"]


class SpatialTransformer(nn.Module):
    """The layer ``voxelmorph.nn.modules.SpatialTransformer`` of voxelmorph 0.3.

    ``output[b, c, o] = sample(moving_image[b, c], o + deformation_field[b, :, o])``, 0 outside

    Args:
        interpolation_mode: ``"linear"`` or ``"nearest"``.
        align_corners: True, as in the formula. With False, every point p is sampled at ``p * S / (S - 1) - 1/2``, where
            S is the length of the axis: voxelmorph normalises as with True, and samples as with False.
        device: has no effect.

    Shapes of ``forward(moving_image, deformation_field)``: ``moving_image [B, C, *S]`` with one to three spatial axes;
    ``deformation_field [B, N, *S]`` in pixels, in tensor-axis order; output ``[B, C, *S]``. An image of integers is
    sampled in float32; with ``"nearest"`` the output has its dtype. On an axis with a single pixel the field has no
    effect if ``align_corners``, as in voxelmorph.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> SpatialTransformer()(torch.randn(1, 1, 8, 9, 10), torch.randn(1, 3, 8, 9, 10)).shape
        torch.Size([1, 1, 8, 9, 10])
    """

    def __init__(
        self,
        interpolation_mode: str = "linear",
        align_corners: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        check_choice("interpolation_mode", interpolation_mode, ("linear", "nearest"))
        self.interpolation_mode, self.align_corners = interpolation_mode, align_corners

    def forward(self, moving_image: Tensor, deformation_field: Tensor) -> Tensor:
        """Sample ``moving_image`` at the pixels that ``deformation_field`` moves."""
        return _transform(self, moving_image, deformation_field)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"interpolation_mode={self.interpolation_mode!r}, align_corners={self.align_corners}"


# It reads nothing of a layer but what voxelmorph's own has: where that is patched, it is its forward.


def _transform(layer: Any, moving_image: Tensor, deformation_field: Tensor) -> Tensor:
    check_tensor("moving_image", moving_image)
    image = moving_image if moving_image.is_floating_point() else moving_image.float()
    check_field("moving_image", image, [1, 2, 3])
    check_floating("deformation_field", deformation_field)
    check_alike("deformation_field", deformation_field, "moving_image", image, dtype=False)
    size, dtype = list(image.shape[2:]), compute_dtype(image.dtype)
    expected = [image.shape[0], len(size), *size]
    if list(deformation_field.shape) != expected:
        raise ValueError(
            f"deformation_field has shape {list(deformation_field.shape)}; with moving_image of shape "
            f"{list(image.shape)} it must be {expected}"
        )
    points = deformation_field.to(dtype).movedim(1, -1) + positions(size, dtype, image.device)
    length = points.new_tensor(size)
    if layer.align_corners:
        points = points * (length > 1)
    else:
        points = points * (length / (length - 1).clamp(min=1)) - 0.5
    output = sample_pixels(image, points, layer.interpolation_mode, "zeros", layer.align_corners)
    return output.to(moving_image.dtype) if layer.interpolation_mode == "nearest" else output
