"""``torchvision.ops``: deformable convolution of images."""

from collections.abc import Sequence

from torch import Tensor

from ..ops import deform_conv2d as _deform_conv2d


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, as ``torchvision.ops.deform_conv2d``: :func:`deformkit.deform_conv2d` by its own name.

    Args:
        input: ``[B, C, H, W]``.
        offset: ``[B, og*kh*kw*2, Hout, Wout]`` in pixels, for each tap the shift along h, then along w.
        weight: ``[Cout, C/groups, kh, kw]``.
        bias: ``[Cout]`` or None.
        stride: step of the output positions, in pixels.
        padding: how far the first tap lies before the input, in pixels.
        dilation: distance of two taps, in pixels.
        mask: ``[B, og*kh*kw, Hout, Wout]`` factors of the taps, or None.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``input``.

    Raises:
        TypeError: an argument is no tensor, or has a wrong dtype.
        ValueError: a shape, device or size that does not fit, by name.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 8, 3, 3)
        >>> deform_conv2d(input, torch.zeros(2, 18, 20, 30), weight, padding=1).shape
        torch.Size([2, 16, 20, 30])
    """
    return _deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
