"""``mmcv.ops``: deformable convolution, RoI pooling and multi-scale deformable attention of images."""

from collections.abc import Sequence

from torch import Tensor

from ..ops import deform_conv2d as _deform_conv2d
from ..ops import deform_roi_pool as _deform_roi_pool
from ..ops._shape import check_floating, check_tensor, compute_dtype, prod, times
from .deformable_detr import MSDeformAttnFunction as MultiScaleDeformableAttnFunction
from .deformable_detr import ms_deform_attn_core_pytorch as multi_scale_deformable_attn_pytorch

__all__ = [
    "MultiScaleDeformableAttnFunction",
    "deform_conv2d",
    "deform_roi_pool",
    "modulated_deform_conv2d",
    "multi_scale_deformable_attn_pytorch",
]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Deformable convolution without a mask, as ``mmcv.ops.deform_conv2d``; see :func:`deformkit.deform_conv2d`.

    Args:
        input: ``[B, C, H, W]``; it and ``weight`` are taken in the dtype of ``offset``, as in mmcv.
        offset: ``[B, deform_groups*kh*kw*2, Hout, Wout]`` in pixels, for each tap the shift along h, then along w.
        weight: ``[Cout, C/groups, kh, kw]``.
        stride: step of the output positions, in pixels.
        padding: how far the first tap lies before the input, in pixels.
        dilation: distance of two taps, in pixels.
        groups: the channels are convolved in so many separate groups.
        deform_groups: the channels of one such group share their offsets.
        bias: must be False.
        im2col_step: has no meaning here; the batch may have any size.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``offset``.

    Raises:
        TypeError: an argument is no tensor, or has a wrong dtype.
        ValueError: a shape, device, size or number of groups that does not fit, by name.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 4, 3, 3)
        >>> deform_conv2d(input, torch.zeros(2, 36, 20, 30), weight, 1, 1, 1, 2, 2).shape
        torch.Size([2, 16, 20, 30])
    """
    if bias is not False:
        raise ValueError(f"bias is {bias!r}; deform_conv2d has none: it must be False")
    return _conv(input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Deformable convolution with a mask, as ``mmcv.ops.modulated_deform_conv2d``.

    Args:
        input: this, and all of which no more is said, as in :func:`deform_conv2d`.
        offset: in pixels.
        mask: ``[B, deform_groups*kh*kw, Hout, Wout]`` factors of the taps.
        weight: of the taps.
        bias: ``[Cout]`` or None.
        stride: of the output positions.
        padding: of the input.
        dilation: of the taps.
        groups: of channels.
        deform_groups: of offsets and masks.

    Returns:
        ``[B, Cout, Hout, Wout]`` in the dtype of ``offset``.

    Raises:
        TypeError: an argument is no tensor, or has a wrong dtype.
        ValueError: a shape, device, size or number of groups that does not fit, by name.

    Example:
        >>> import torch
        >>> input, weight = torch.randn(2, 8, 20, 30), torch.randn(16, 8, 3, 3)
        >>> offset, mask = torch.zeros(2, 18, 20, 30), torch.ones(2, 9, 20, 30)
        >>> modulated_deform_conv2d(input, offset, mask, weight, None, 1, 1).shape
        torch.Size([2, 16, 20, 30])
    """
    check_tensor("mask", mask)
    return _conv(input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Deformable RoI pooling, as ``mmcv.ops.deform_roi_pool``; see :func:`deformkit.deform_roi_pool`.

    Args:
        input: ``[B, C, H, W]``.
        rois: ``[R, 5]``: index of the image, x1, y1, x2, y2; in half precision they are read as float32.
        offset: ``[R, 2, *output_size]``, along x, then along y, or None.
        output_size: number of bins along h and w.
        spatial_scale: pixels of ``input`` for one unit of ``rois``.
        sampling_ratio: samples in a bin along each axis; 0: one for each pixel that a bin is long, rounded up.
        gamma: how far an offset of 1 moves a bin, in lengths of its RoI.

    Returns:
        ``[R, C, *output_size]`` in the dtype of ``input``.

    Raises:
        TypeError: an argument is no tensor or no number, or has a wrong dtype.
        ValueError: a shape, device, size, number or batch index that does not fit, by name.

    Example:
        >>> import torch
        >>> rois = torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0], [1.0, 0.0, 0.0, 480.0, 320.0]])
        >>> deform_roi_pool(torch.randn(2, 8, 20, 30), rois, None, (7, 7), 1 / 16).shape
        torch.Size([2, 8, 7, 7])
    """
    return _deform_roi_pool(
        input,
        _whole_rois(input, rois),
        offset,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )


def _conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    for name, value, axes in (("input", input, 4), ("offset", offset, 4), ("weight", weight, 4)):
        check_floating(name, value)
        if value.dim() != axes:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must have {axes} axes")
    # The operator reads both numbers off the shapes: a wrong one would be taken for another convolution.
    channels, per_group, kernel = input.shape[1], weight.shape[1], weight.shape[2:]
    if channels != groups * per_group:
        raise ValueError(
            f"groups is {groups}; input has {channels} channels and weight {per_group} for each group, "
            f"so that it must be {channels / max(per_group, 1):g}"
        )
    needed = 2 * prod(kernel)
    if offset.shape[1] != deform_groups * needed:
        raise ValueError(
            f"deform_groups is {deform_groups}; offset has {offset.shape[1]} channels, and a {times(kernel)} kernel "
            f"needs {needed} for each group, so that it must be {offset.shape[1] / max(needed, 1):g}"
        )
    tensors = [value if value is None else value.to(offset.dtype) for value in (input, weight, bias, mask)]
    input, weight, bias, mask = tensors  # type: ignore[assignment]  # only the last two may be None
    return _deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def _whole_rois(input: Tensor, rois: Tensor) -> Tensor:
    """The RoIs in the dtype that the operator takes, whatever the host computes in."""
    check_floating("input", input)
    check_floating("rois", rois)
    return rois.to(compute_dtype(input.dtype))
