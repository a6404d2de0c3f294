"""The public functions as ``torch.jit.script`` compiles them: typed for TorchScript, and checked by the kernels alone.

A scripted function knows no union of a number and a sequence, and no keyword-only argument with a default.
"""

from typing import Optional

import torch
from torch import Tensor

from ._levels import over_heads_and_levels
from ._torch import BroadcastingList1, BroadcastingList2, BroadcastingList3


# TorchScript reads no global list: the names of CHOICES stand here again.
def boundary_code(boundary: str) -> int:
    """The code of ``boundary`` in the schemas."""
    return _code("boundary", boundary, ["zeros", "border", "reflect"])


def mode_code(mode: str) -> int:
    """The code of ``mode`` in the schemas."""
    return _code("mode", mode, ["linear", "nearest"])


def _code(argument: str, name: str, choices: list[str]) -> int:
    if name not in choices:
        raise ValueError(f"{argument} is '{name}'; it must be one of {choices}")
    return choices.index(name)


def _each(value: list[int] | None, default: int, axes: int) -> list[int]:
    return [default for _ in range(axes)] if value is None else value


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int] | None,
    padding: list[int] | None,
    dilation: list[int] | None,
    mask: Tensor | None,
    boundary: str,
) -> Tensor:
    axes = input.dim() - 2
    return torch.ops.deformkit.deform_conv(
        input,
        offset,
        weight,
        bias,
        _each(stride, 1, axes),
        _each(padding, 0, axes),
        _each(dilation, 1, axes),
        mask,
        boundary_code(boundary),
    )


def deform_conv1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Optional[BroadcastingList1[int]] = None,
    padding: Optional[BroadcastingList1[int]] = None,
    dilation: Optional[BroadcastingList1[int]] = None,
    mask: Tensor | None = None,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_conv1d`."""
    return _deform_conv(input, offset, weight, bias, stride, padding, dilation, mask, boundary)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Optional[BroadcastingList2[int]] = None,
    padding: Optional[BroadcastingList2[int]] = None,
    dilation: Optional[BroadcastingList2[int]] = None,
    mask: Tensor | None = None,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_conv2d`."""
    return _deform_conv(input, offset, weight, bias, stride, padding, dilation, mask, boundary)


def deform_conv3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Optional[BroadcastingList3[int]] = None,
    padding: Optional[BroadcastingList3[int]] = None,
    dilation: Optional[BroadcastingList3[int]] = None,
    mask: Tensor | None = None,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_conv3d`."""
    return _deform_conv(input, offset, weight, bias, stride, padding, dilation, mask, boundary)


def _deform_conv_transpose(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int] | None,
    padding: list[int] | None,
    output_padding: list[int] | None,
    groups: int,
    dilation: list[int] | None,
    mask: Tensor | None,
    boundary: str,
) -> Tensor:
    axes = input.dim() - 2
    output = torch.ops.deformkit.deform_conv_transpose(
        input,
        offset,
        weight,
        _each(stride, 1, axes),
        _each(padding, 0, axes),
        _each(output_padding, 0, axes),
        groups,
        _each(dilation, 1, axes),
        mask,
        boundary_code(boundary),
    )
    if bias is not None:
        output = output + bias.to(output.dtype).reshape([-1] + [1] * axes)
    return output


def deform_conv_transpose1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Optional[BroadcastingList1[int]] = None,
    padding: Optional[BroadcastingList1[int]] = None,
    output_padding: Optional[BroadcastingList1[int]] = None,
    groups: int = 1,
    dilation: Optional[BroadcastingList1[int]] = None,
    mask: Tensor | None = None,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_conv_transpose1d`; ``output_padding`` must be less than the stride."""
    return _deform_conv_transpose(
        input, offset, weight, bias, stride, padding, output_padding, groups, dilation, mask, boundary
    )


def deform_conv_transpose2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Optional[BroadcastingList2[int]] = None,
    padding: Optional[BroadcastingList2[int]] = None,
    output_padding: Optional[BroadcastingList2[int]] = None,
    groups: int = 1,
    dilation: Optional[BroadcastingList2[int]] = None,
    mask: Tensor | None = None,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_conv_transpose2d`; ``output_padding`` must be less than the stride."""
    return _deform_conv_transpose(
        input, offset, weight, bias, stride, padding, output_padding, groups, dilation, mask, boundary
    )


def deform_conv_transpose3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Optional[BroadcastingList3[int]] = None,
    padding: Optional[BroadcastingList3[int]] = None,
    output_padding: Optional[BroadcastingList3[int]] = None,
    groups: int = 1,
    dilation: Optional[BroadcastingList3[int]] = None,
    mask: Tensor | None = None,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_conv_transpose3d`; ``output_padding`` must be less than the stride."""
    return _deform_conv_transpose(
        input, offset, weight, bias, stride, padding, output_padding, groups, dilation, mask, boundary
    )


def deform_aggregate(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    boundary: str = "zeros",
) -> Tensor:
    """See :func:`deformkit.deform_aggregate`; every size has as many numbers as there are spatial axes."""
    return torch.ops.deformkit.deform_aggregate(
        value,
        offset,
        weight,
        kernel_size,
        _each(stride, 1, len(kernel_size)),
        _each(padding, 0, len(kernel_size)),
        _each(dilation, 1, len(kernel_size)),
        offset_scale,
        remove_center,
        boundary_code(boundary),
    )


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: list[list[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int] | None = None,
    mode: str = "linear",
) -> Tensor:
    """See :func:`deformkit.ms_deform_attn`; the sizes are lists, and ``num_points`` too."""
    sizes: list[int] = []
    for size in spatial_shapes:
        sizes.extend(size)
    has_levels = sampling_locations.dim() == 6
    if has_levels:
        points = [sampling_locations.shape[4] for _ in spatial_shapes]
    else:
        points = [sampling_locations.shape[3]] if num_points is None else num_points
    heads, levels = value.shape[2], len(spatial_shapes)
    sampling_locations = over_heads_and_levels(sampling_locations, heads, levels, has_levels)
    attention_weights = over_heads_and_levels(attention_weights, heads, levels, has_levels)
    code = mode_code(mode)
    return torch.ops.deformkit.ms_deform_attn(value, sizes, sampling_locations, attention_weights, points, code)


def deform_correlate(
    query: Tensor,
    key: Tensor,
    spatial_shapes: list[list[int]],
    sampling_locations: Tensor,
    num_points: list[int] | None = None,
    mode: str = "linear",
) -> Tensor:
    """See :func:`deformkit.deform_correlate`; the sizes are lists, and ``num_points`` too."""
    sizes: list[int] = []
    for size in spatial_shapes:
        sizes.extend(size)
    has_levels = sampling_locations.dim() == 6
    if has_levels:
        points = [sampling_locations.shape[4] for _ in spatial_shapes]
    else:
        points = [sampling_locations.shape[3]] if num_points is None else num_points
    locations = over_heads_and_levels(sampling_locations, query.shape[2], len(spatial_shapes), has_levels)
    code = mode_code(mode)
    output = torch.ops.deformkit.deform_correlate(query.flatten(2), key, sizes, locations, points, code)
    if has_levels:
        output = output.unflatten(3, [len(spatial_shapes), sampling_locations.shape[4]])
    return output


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    group_size: list[int] | None = None,
) -> Tensor:
    """See :func:`deformkit.deform_roi_pool`; sizes have as many numbers as there are spatial axes.

    There is one offset group.
    """
    groups: list[int] = [0] if group_size is None else group_size
    return torch.ops.deformkit.deform_roi_pool(
        input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, groups
    )


def deform_sample(input: Tensor, points: Tensor, boundary: str = "zeros", mode: str = "linear") -> Tensor:
    """See :func:`deformkit.deform_sample`."""
    boundary_, mode_ = boundary_code(boundary), mode_code(mode)
    if points.dim() == 3:
        return torch.ops.deformkit.deform_sample(input, points.unsqueeze(2), boundary_, mode_).squeeze(2)
    return torch.ops.deformkit.deform_sample(input, points, boundary_, mode_)


def deform_splat(input: Tensor, points: Tensor, size: list[int], boundary: str = "zeros") -> Tensor:
    """See :func:`deformkit.deform_splat`; ``size`` has as many numbers as there are spatial axes."""
    if input.dim() == 2:
        input, points = input.unsqueeze(2), points.unsqueeze(2)
    return torch.ops.deformkit.deform_splat(input, points, size, boundary_code(boundary))
