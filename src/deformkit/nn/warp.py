"""Layers of warping: a field sampled where a displacement points."""

from typing import ClassVar

from torch import Tensor, nn

from ..ops._shape import Boundary, Mode, check_choice
from ..ops.deform_sample.op import deform_sample
from ._field import check_field, moved_positions
from ._public import OwnNames


class _Warp(OwnNames, nn.Module):
    spatial_dims: ClassVar[int]

    def __init__(self, boundary: Boundary = "zeros", mode: Mode = "linear") -> None:
        super().__init__()
        check_choice("boundary", boundary, ("zeros", "border", "reflect"))
        check_choice("mode", mode, ("linear", "nearest"))
        self.boundary, self.mode = boundary, mode

    def forward(self, input: Tensor, displacement: Tensor) -> Tensor:
        """Sample ``input [B, C, *S]`` at the pixels moved by ``displacement [B, N, *S]``; return ``[B, C, *S]``."""
        check_field("input", input, [self.spatial_dims])
        points = moved_positions("displacement", displacement, input)
        return deform_sample(input, points, boundary=self.boundary, mode=self.mode)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"boundary={self.boundary!r}, mode={self.mode!r}"


class Warp1d(_Warp):
    """Backward warping of a sequence; :class:`Warp2d` with one spatial axis.

    Shapes: ``input [B, C, L]``, ``displacement [B, 1, L]`` in samples, output ``[B, C, L]``.

    Example:
        >>> import torch
        >>> Warp1d()(torch.arange(4.0).reshape(1, 1, 4), torch.full((1, 1, 4), 0.5))
        tensor([[[0.5000, 1.5000, 2.5000, 1.5000]]])
    """

    spatial_dims = 1


class Warp2d(_Warp):
    """Backward warping of an image by a displacement of every pixel, such as optical flow.

    ``output[b, c, o] = sample(input[b, c], o + displacement[b, :, o])``

    Args:
        boundary: what lies outside: ``"zeros"``, ``"border"`` or ``"reflect"``, as in :func:`deformkit.deform_sample`.
        mode: ``"linear"``; or ``"nearest"``, without a gradient to the displacement.

    Shapes of ``forward(input, displacement)``:
        ``input [B, C, H, W]``; ``displacement [B, 2, H, W]`` in pixels, channel 0 along h and channel 1 along w: flow
        that is stored as (x, y) is given as ``flow.flip(1)``. float64 if ``input`` is float64, else float32 or a half
        dtype. Output ``[B, C, H, W]`` in the dtype of ``input``.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> frame, flow = torch.randn(2, 3, 32, 48), torch.randn(2, 2, 32, 48)
        >>> Warp2d(boundary="border")(frame, flow).shape
        torch.Size([2, 3, 32, 48])

    Papers: Spatial Transformer Networks, https://arxiv.org/abs/1506.02025; VoxelMorph, https://arxiv.org/abs/1809.05231.
    """

    spatial_dims = 2


class Warp3d(_Warp):
    """Backward warping of a volume, as in registration; :class:`Warp2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, ``displacement [B, 3, D, H, W]`` in voxels along d, h and w, output
    ``[B, C, D, H, W]``.

    Example:
        >>> import torch
        >>> Warp3d()(torch.randn(1, 2, 8, 9, 10), torch.zeros(1, 3, 8, 9, 10)).shape
        torch.Size([1, 2, 8, 9, 10])
    """

    spatial_dims = 3
