"""Deformable large kernel attention: depthwise deformable convolutions that gate their input."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops._shape import check_count
from ._field import check_field
from ._public import OwnNames
from .deform_conv import PackedDeformConv2d, PackedDeformConv3d

_CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_DEFORM_CONVS: dict[int, Any] = {2: PackedDeformConv2d, 3: PackedDeformConv3d}


class _DeformLKA(OwnNames, nn.Module):
    spatial_dims: ClassVar[int]

    def __init__(self, dim: int, kernel_size: int = 5, dilated_kernel_size: int = 7, dilation: int = 3) -> None:
        super().__init__()
        counts = {"dim": dim, "kernel_size": kernel_size, "dilated_kernel_size": dilated_kernel_size}
        for name, count in {**counts, "dilation": dilation}.items():
            check_count(name, count)
            if "kernel" in name and count % 2 == 0:
                raise ValueError(f"{name} is {count}; it must be odd, so that the output has the size of the input")
        self.dim = dim
        conv, deform = _CONVS[self.spatial_dims], _DEFORM_CONVS[self.spatial_dims]
        self.input_proj, self.output_proj, self.pointwise = (conv(dim, dim, 1) for _ in range(3))
        self.activation = nn.GELU()
        self.local = deform(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        reach = dilation * (dilated_kernel_size // 2)
        self.distant = deform(dim, dim, dilated_kernel_size, padding=reach, dilation=dilation, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """Gate ``input`` by what lies around each position, and add it."""
        check_field("input", input, [self.spatial_dims])
        if input.shape[1] != self.dim:
            raise ValueError(f"input has {input.shape[1]} channels; this layer has dim={self.dim}")
        values = self.activation(self.input_proj(input))
        gate = self.pointwise(self.distant(self.local(values)))
        return input + self.output_proj(values * gate)


class DeformLKA2d(_DeformLKA):
    """Deformable large kernel attention on an image.

    ``output = input + output_proj(u * pointwise(distant(local(u))))``, ``u = GELU(input_proj(input))``

    where ``local`` and ``distant`` are depthwise :class:`PackedDeformConv2d`, the second dilated, whose offsets are
    shared by all channels and start at 0, and the projections are convolutions with kernels of one element.

    Args:
        dim: C, channels of the input and of the output.
        kernel_size: kernel of ``local``, odd.
        dilated_kernel_size: kernel of ``distant``, odd.
        dilation: dilation of ``distant``.

    Shapes: ``input [B, C, H, W]``, output ``[B, C, H, W]``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> DeformLKA2d(8)(torch.randn(1, 8, 20, 24)).shape
        torch.Size([1, 8, 20, 24])

    Paper: Beyond Self-Attention: Deformable Large Kernel Attention, https://arxiv.org/abs/2309.00121.
    """

    spatial_dims = 2


class DeformLKA3d(_DeformLKA):
    """Deformable large kernel attention on a volume; :class:`DeformLKA2d` with three spatial axes.

    Shapes: ``input [B, C, D, H, W]``, output ``[B, C, D, H, W]``.

    Example:
        >>> import torch
        >>> DeformLKA3d(2, 3, 3, 2)(torch.randn(1, 2, 5, 6, 7)).shape
        torch.Size([1, 2, 5, 6, 7])
    """

    spatial_dims = 3
