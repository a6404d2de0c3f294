"""The definition of deformable RoI pooling, in tensor operations."""

from collections.abc import Sequence
from functools import reduce
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from .. import _form, _torch
from .._shape import compute_dtype
from ..sample.reference import clamped, has_nan, sample, tap_grid

MOST_SAMPLES = 1024


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    group_size: Sequence[int],
) -> Tensor:
    """Deformable RoI pooling; see :func:`deformkit.deform_roi_pool` for the formula and the shapes."""
    axes, dtype, group_size = input.dim() - 2, compute_dtype(input.dtype), cells_of(group_size)
    # An exported model has no detach, which other runtimes do not know.
    constant = not rois.requires_grad and not _torch.transforming()
    rois = (rois if constant else rois.detach()).to(dtype)
    offset = None if offset is None else offset.to(dtype)
    start, length, moved = _placed(rois, offset, spatial_scale, gamma)
    image = _image_index(rois[:, 0], input.shape[0])

    if sampling_ratio > 0 or rois.shape[0] == 0:
        output = _pool(input, image, start, length, moved, output_size, [sampling_ratio] * axes, group_size)
    else:
        counts = _adaptive_counts(length, output_size)
        order = sorted(range(len(counts)), key=counts.__getitem__)
        parts = []
        for samples, group in groupby(order, key=counts.__getitem__):
            rows = torch.tensor(list(group), device=input.device)
            shift = None if moved is None else moved[rows]
            parts.append(_pool(input, image[rows], start[rows], length[rows], shift, output_size, samples, group_size))
        output = torch.cat(parts)[torch.tensor(order, device=input.device).argsort()]
    return output.to(input.dtype)


def cells_of(group_size: Sequence[int]) -> list[int]:
    """The number of cells along each axis; empty if pooling is not position-sensitive.

    The operator is told so by zeros, because a package of AOTInductor does not keep an empty list.
    """
    return list(group_size) if any(group_size) else []


def sampling_points(
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> list[Tensor]:
    """For each RoI the points that its bins read, ``[*output_size, samples, N]``, in tensor-axis order, in pixels."""
    start, length, moved = _placed(rois, offset, spatial_scale, gamma)
    axes = length.shape[1]
    counts = adaptive_samples(length, output_size).tolist()
    found = []
    for row, adaptive in enumerate(counts):
        samples = [sampling_ratio] * axes if sampling_ratio > 0 else adaptive
        shift = None if moved is None else moved[row : row + 1]
        points = _points(start[row : row + 1], length[row : row + 1], shift, output_size, samples)
        found.append(points[0].unflatten(0, list(output_size)))
    return found


def _placed(
    rois: Tensor, offset: Tensor | None, spatial_scale: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where RoIs start and how long they are, ``[R, N]``, and how far their bins move, in tensor-axis order."""
    axes = (rois.shape[1] - 1) // 2
    low, high = rois[:, 1 : 1 + axes].flip(1), rois[:, 1 + axes :].flip(1)
    length = (high - low) * spatial_scale
    moved = None
    if offset is not None:
        moved = gamma * length.reshape(*length.shape, *[1] * axes) * offset.flip(1)
    return low * spatial_scale - 0.5, length, moved


def adaptive_samples(length: Tensor, output_size: Sequence[int]) -> Tensor:
    """The number of samples in each bin of each RoI along each axis, ``[R, N]``."""
    counts = torch.stack([length[:, axis] / bins for axis, bins in enumerate(output_size)], 1).ceil()
    # One sample propagates a NaN corner; no sample would hide it.
    unknown = ~length.isfinite().all(1, keepdim=True)
    return counts.clamp(0, MOST_SAMPLES).masked_fill(unknown, 1.0).to(torch.int64)


def _adaptive_counts(length: Tensor, output_size: Sequence[int]) -> list[list[int]]:
    """:func:`adaptive_samples` as numbers, which a traced model would keep for all other RoIs."""
    if torch.compiler.is_exporting() or _torch.tracing():
        raise _form.NoPlainForm(
            "sampling_ratio is 0; in a model of plain operations it must be at least 1, because their number would "
            "depend on the RoIs"
        )
    return adaptive_samples(length, output_size).tolist()


def _image_index(index: Tensor, batch: int) -> Tensor:
    known = (index == index.floor()).logical_and(index.abs() < 2**31)
    # gather rejects an index of -1; plain indexing would count it from the end.
    return torch.arange(batch, device=index.device).gather(0, index.masked_fill(~known, -1.0).to(torch.int64))


def _pool(
    input: Tensor,
    image: Tensor,
    start: Tensor,
    length: Tensor,
    moved: Tensor | None,
    output_size: Sequence[int],
    samples: Sequence[int],
    group_size: Sequence[int],
) -> Tensor:
    """The means over ``samples`` points along each axis of each bin, ``[R, C, *output_size]``."""
    size, groups = input.shape[2:], prod(group_size)
    count, axes = length.shape
    points = _points(start, length, moved, output_size, samples)

    undefined = has_nan(points)
    # Twice the margin: half of a symbolic size is a number that other runtimes do not know.
    margin = 1 if group_size else 2
    twice = points * 2
    sides = (
        (twice[..., axis] < -margin).logical_or(twice[..., axis] > 2 * size[axis] - 2 + margin) for axis in range(axes)
    )
    outside = reduce(torch.logical_or, sides).logical_and(~undefined)
    points = points.masked_fill(outside.unsqueeze(-1), 0.0)

    # One field of all images and groups, one after the other along the first axis; each ends in its last row twice, so
    # that the cell of a point on that row does not reach into the next one.
    field = torch.cat([input, input[:, :, -1:]], 2)
    field = field.reshape(input.shape[0], input.shape[1] // groups, groups * (size[0] + 1), *size[1:])
    field = field.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    group = group_of_bins(output_size, group_size, image.device).flatten()
    rows = (image.unsqueeze(1) * groups + group) * (size[0] + 1)
    base = torch.stack([rows, *[torch.zeros_like(rows)] * (axes - 1)], -1).unsqueeze(2)
    first = torch.where(undefined, points[..., 0], clamped(points[..., 0], size[0] - 1))
    points = torch.cat([first.unsqueeze(-1), points[..., 1:]], -1)
    values = sample(field, base, points.unsqueeze(0), "border")[0]
    sums = values.masked_fill(outside, 0.0).transpose(0, 1).sum(-1)
    if group_size:
        means = sums / outside.logical_not().sum(-1).clamp(min=1).unsqueeze(1)
    else:
        means = sums / max(prod(samples), 1)
    return means.reshape(count, sums.shape[1], *output_size)


def group_of_bins(output_size: Sequence[int], group_size: Sequence[int], device: torch.device) -> Tensor:
    """The group of channels that each bin reads, ``[*output_size]``; without groups there is one for all."""
    group = torch.zeros([1] * len(output_size), dtype=torch.int64, device=device)
    for axis, groups in enumerate(group_size):
        bins = torch.arange(output_size[axis], device=device) * groups // output_size[axis]
        group = group * groups + bins.reshape([-1 if a == axis else 1 for a in range(len(output_size))])
    return group


def _points(
    start: Tensor,
    length: Tensor,
    moved: Tensor | None,
    output_size: Sequence[int],
    samples: Sequence[int],
) -> Tensor:
    """The points of each bin, ``[R, bins, samples of a bin, N]``."""
    count, axes = length.shape
    ones, none = [1] * axes, [0] * axes
    bin, number = (
        tap_grid(ones, grid, ones, none, ones, length.device).reshape(-1, axes).to(length.dtype)
        for grid in (output_size, samples)
    )
    coordinates = []
    for axis, (bins, n) in enumerate(zip(output_size, samples, strict=True)):
        place = bin[:, axis].unsqueeze(1) + (number[:, axis] + 0.5) / n
        origin = start[:, axis].reshape(count, 1, 1)
        if moved is not None:
            origin = origin + moved[:, axis].reshape(count, prod(output_size), 1)
        coordinates.append(origin + place * (length[:, axis] / bins).reshape(count, 1, 1))
    return torch.stack(coordinates, -1)
