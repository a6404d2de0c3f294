"""MONAI: the layer that warps an image by a displacement field."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn._field import check_field, positions
from ..ops._shape import check_alike, check_choice, check_floating, compute_dtype
from ._grid_sample import sample_pixels

__all__ = ["Warp"]


class Warp(nn.Module):
    """The layer ``monai.networks.blocks.Warp`` of MONAI 1.6, as it is without MONAI's compiled part.

    ``output[b, c, o] = sample(image[b, c], o + ddf[b, :, o])``

    On an axis with a single pixel the displacement has no effect, as in MONAI. For a layer of deformkit that moves
    pixels there too, and has no points half-way between them, see :class:`deformkit.nn.Warp2d`.

    Args:
        mode: ``"bilinear"``, which is trilinear for volumes, ``"nearest"``, or ``"bicubic"``, which is computed by
            :func:`torch.nn.functional.grid_sample`, for images alone.
        padding_mode: what lies outside: ``"border"``, ``"zeros"`` or ``"reflection"`` (at the centres of the end
            pixels).
        jitter: whether to add the same random numbers from 0 to 1 to the positions in every call, as MONAI does.

    Shapes of ``forward(image, ddf)``: ``image [B, C, *S]`` with one to three spatial axes; ``ddf [B, N, *S]`` in
    pixels, in tensor-axis order; output ``[B, C, *S]``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> Warp()(torch.randn(1, 2, 8, 9, 10), torch.randn(1, 3, 8, 9, 10)).shape
        torch.Size([1, 2, 8, 9, 10])
    """

    def __init__(self, mode: str = "bilinear", padding_mode: str = "border", jitter: bool = False) -> None:
        super().__init__()
        check_choice("mode", mode, ("bilinear", "nearest", "bicubic"))
        check_choice("padding_mode", padding_mode, ("zeros", "border", "reflection"))
        self._interp_mode, self._padding_mode, self.jitter = str(mode), str(padding_mode), jitter

    def forward(self, image: Tensor, ddf: Tensor) -> Tensor:
        """Sample ``image`` at the pixels that ``ddf`` moves."""
        return _warp(self, image, ddf)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"mode={self._interp_mode!r}, padding_mode={self._padding_mode!r}, jitter={self.jitter}"


# It reads nothing of a layer but what MONAI's own has: where that is patched, it is its forward.


def _warp(layer: Any, image: Tensor, ddf: Tensor) -> Tensor:
    check_field("image", image, [1, 2, 3])
    check_floating("ddf", ddf)
    check_alike("ddf", ddf, "image", image, dtype=False)
    size = list(image.shape[2:])
    expected = [image.shape[0], len(size), *size]
    if list(ddf.shape) != expected:
        raise ValueError(
            f"ddf has shape {list(ddf.shape)}; with image of shape {list(image.shape)} it must be {expected}"
        )
    moved = ddf.to(compute_dtype(image.dtype)).movedim(1, -1) + positions(size, compute_dtype(image.dtype), ddf.device)
    if layer.jitter:
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            moved = moved + torch.rand_like(ddf).movedim(1, -1)
    moved = moved * moved.new_tensor([length > 1 for length in size])
    mode, padding_mode = layer._interp_mode, layer._padding_mode
    if mode == "bicubic":
        last = moved.new_tensor([max(length - 1, 1) for length in size])
        grid = (moved * 2 / last - 1).flip(-1).to(image.dtype)
        return F.grid_sample(image, grid, mode=mode, padding_mode=padding_mode, align_corners=True)
    return sample_pixels(image, moved, mode, padding_mode, True)
