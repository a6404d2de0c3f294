"""Deformable RoI pooling: the public function, its checks, and the registration."""

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from .. import _script
from .._library import define
from .._public import public
from .._shape import (
    axes_of,
    check_alike,
    check_offset_dtype,
    check_stored,
    checked_axes,
    compute_dtype,
    ntuple,
    times,
)
from .._suspect import readable, warn_of_gradient, warn_of_inverted_rois
from . import reference

# As in cpu_points.h.
_MOST_BINS = 2**31


@public(_script.deform_roi_pool)
def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    *,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    group_size: int | Sequence[int] | None = None,
) -> Tensor:
    """Deformable RoI pooling: the mean of the input over each bin of each region, where offsets move the bins.

    A region of interest (RoI) is cut into ``output_size`` bins along each axis, and

    ``output[r, c, bin] = mean over i of sample(input[b_r, c], p[r, bin, i])``, where along each axis

    ``p = start + gamma * length * offset[r, bin] + (bin + (i + 1/2) / n) * length / output_size``,
    ``start = low * spatial_scale - 1/2``, ``length = (high - low) * spatial_scale``

    Here ``low`` and ``high`` are the corners of the RoI, ``n`` is the number of samples in a bin along the axis
    (i = 0 ... n - 1), and ``sample`` is multilinear interpolation: a point up to one pixel outside the input is clamped
    into it; a point farther out counts as 0. As in mmcv, samples are averaged and regions are aligned (shifted by half
    a pixel). The original RoI pooling takes a maximum instead.

    With ``group_size`` the pooling is position-sensitive, as in R-FCN and the DCN papers: a grid of
    G = prod(``group_size``) cells lies over each RoI, each channel of the output has one channel of the input for each
    cell, and

    ``output[r, c, bin] = mean over i of sample(input[b_r, c * G + cell(bin)], p[r, bin, i])``, where ``cell`` is the
    row-major number of the cell that along each axis is ``bin * group_size // output_size``

    A sample more than half a pixel outside the input is then left out of the mean, which is 0 if all are.

    Args:
        input: ``[B, C, *S]`` with N = 1, 2 or 3 spatial axes, or ``[B, C * G, *S]`` if position-sensitive; float16,
            bfloat16, float32 or float64.
        rois: ``[R, 1 + 2N]``: the index of the image in the batch, then the corners, **x first**: ``x1, x2`` of a
            segment, ``x1, y1, x2, y2`` of a box, ``x1, y1, z1, x2, y2, z2`` of a cuboid; x is along the last axis of
            ``input``. In units of ``1 / spatial_scale`` pixels: 0 is the outer edge of the first pixel. float64 if
            ``input`` is float64, else float32, even if ``input`` is in half precision. It gets no gradient; a warning
            says so if it requires one.
        offset: ``[R, og * N, *output_size]`` or None, **x first**, in units of ``gamma`` times the length of the RoI
            along the axis. Each of the og offset groups moves ``C / og`` channels of the output, in order; og is 1 for
            most networks, or the number of classes. Any floating dtype, but float64 if and only if ``input`` is
            float64.
        output_size: number of bins along each axis of ``input``, one int for all axes or N ints.
        spatial_scale: number of pixels of ``input`` in one unit of ``rois``, such as 1/16.
        sampling_ratio: n, the number of samples in a bin along each axis, at most 1024. 0: the length of the bin in
            pixels, rounded up, ``ceil(length / output_size)``, at most 1024.
        gamma: distance by which an offset of 1 moves a bin, relative to the length of its RoI.
        group_size: the number of cells along each axis of a RoI that have channels of their own, one int for all axes
            or N ints; with 1, only the rule for samples outside differs. None: not position-sensitive.

    Returns:
        ``[R, C, *output_size]`` in the dtype of ``input``, accumulated in float32, or float64 for a float64 input.

        With ``sampling_ratio=0`` an empty or inverted RoI (``high <= low`` on an axis) has no samples and pools to 0.
        With a fixed ratio an empty RoI is sampled at its point, and an inverted one in reverse order. On a CPU the
        first calls warn of an inverted RoI, which usually is a box given as centre and size. A NaN offset gives NaN in
        its bin and in its own gradient; a NaN corner gives NaN in the whole RoI. With an infinite corner, points are at
        infinity and count as 0, or are undefined and NaN; the gradient of the offsets is NaN. With
        ``sampling_ratio=0`` a RoI whose length is not finite has one sample in a bin.

    Raises:
        TypeError: an argument is not a tensor or not a number, or has a wrong dtype.
        ValueError: a shape, device, size, number or batch index does not fit; the message names the argument. Batch
            indices on a GPU are not checked here, because this would wait for the device.

    Example:
        >>> import torch
        >>> input = torch.randn(2, 8, 20, 30)
        >>> rois = torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0], [1.0, 0.0, 0.0, 480.0, 320.0]])
        >>> deform_roi_pool(input, rois, torch.zeros(2, 2, 7, 7), output_size=7, spatial_scale=1 / 16).shape
        torch.Size([2, 8, 7, 7])

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211; with a mask upon the result,
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168; R-FCN, https://arxiv.org/abs/1605.06409.
    """
    axes = axes_of("input", input)
    sizes = ntuple(output_size, axes, "output_size", 1)
    groups = grid_of(group_size, axes)
    offset_groups = _offset_groups(offset, input, groups)
    # The dispatcher would convert what is not a number.
    check_numbers(spatial_scale, sampling_ratio, gamma)
    numbers = (sizes, spatial_scale, sampling_ratio, gamma, groups or [0] * axes)
    args = (input, rois, offset, *numbers)
    if offset is not None and offset_groups > 1:
        _check(input, rois, offset[:, :axes], *numbers)
        args = (*_of_groups(input, rois, offset, offset_groups), *numbers)
    output = _operator.checked_call(*args)
    warn_of_gradient("rois", rois)
    warn_of_inverted_rois(rois)
    return output if offset_groups == 1 else output.unflatten(0, (-1, offset_groups)).flatten(1, 2)


def grid_of(group_size: int | Sequence[int] | None, axes: int) -> list[int]:
    """``group_size`` with one number for each axis; empty if pooling is not position-sensitive."""
    if group_size is None or (isinstance(group_size, list) and not group_size):
        return []
    return ntuple(group_size, axes, "group_size", 1)


def _offset_groups(offset: Any, input: Tensor, groups: list[int]) -> int:
    """The number of offset groups; 1 if the offset's channels are not a multiple that fits, for the check to say so."""
    axes = input.dim() - 2
    if not isinstance(offset, Tensor) or offset.dim() != axes + 2 or offset.shape[1] % axes:
        return 1
    count = max(offset.shape[1] // axes, 1)
    return count if input.shape[1] % (prod(groups) * count) == 0 else 1


def _of_groups(input: Tensor, rois: Tensor, offset: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The channels of each offset group as an image of its own, and the RoIs in all of them."""
    axes = input.dim() - 2
    number = torch.arange(count, device=rois.device, dtype=rois.dtype)
    image = rois[:, :1] * count + number
    corners = rois[:, None, 1:].expand(-1, count, -1)
    return (
        input.reshape(input.shape[0] * count, input.shape[1] // count, *input.shape[2:]),
        torch.cat([image.unsqueeze(2), corners], 2).flatten(0, 1),
        offset.reshape(offset.shape[0] * count, axes, *offset.shape[2:]),
    )


def _check(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    group_size: list[int],
) -> list[int]:
    """Check every argument; return the shape of the output."""
    axes = checked_axes("input", input)
    check_alike("rois", rois, "input", input, dtype=False)
    expected = compute_dtype(input.dtype)
    if rois.dtype != expected:
        reason = f"convert it with rois.to({expected})"
        if rois.dtype in (torch.float16, torch.bfloat16):
            reason = "half precision cannot represent batch indices and corners accurately"
        raise TypeError(f"rois has dtype {rois.dtype}; with an input of {input.dtype} it must be {expected}: {reason}")
    if rois.dim() != 2 or rois.shape[1] != 1 + 2 * axes:
        raise ValueError(
            f"rois has shape {list(rois.shape)}; with {axes} spatial axes it must be [R, {1 + 2 * axes}]: "
            f"a batch index and 2 corners x {axes} coordinates"
        )
    if prod(output_size) > _MOST_BINS:
        raise ValueError(f"output_size is {times(output_size)}; there must be at most {_MOST_BINS} bins")
    if offset is not None:
        check_alike("offset", offset, "input", input, dtype=False)
        check_offset_dtype(offset, "an input", input.dtype)
        shape = [rois.shape[0], axes, *output_size]
        if list(offset.shape) != shape:
            raise ValueError(
                f"offset has shape {list(offset.shape)}; it must be {shape}: "
                f"{rois.shape[0]} RoIs, {axes} coordinates, {times(output_size)} bins"
            )
    check_numbers(spatial_scale, sampling_ratio, gamma)
    if readable(rois):
        check_stored("rois", rois)
        _check_batch_index(rois, input.shape[0])
    groups = prod(reference.cells_of(group_size))
    if input.shape[1] % groups:
        raise ValueError(
            f"input has {input.shape[1]} channels; with a group_size of {times(group_size)} they must be a multiple "
            f"of {groups}"
        )
    return [rois.shape[0], input.shape[1] // groups, *output_size]


def check_numbers(spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    """Raise unless each is a number that pooling can use."""
    _check_number("spatial_scale", spatial_scale, (int, float), 0, "a finite number above 0")
    _check_number("sampling_ratio", sampling_ratio, (int,), -1, "an int of at least 0")
    if sampling_ratio > reference.MOST_SAMPLES:
        raise ValueError(f"sampling_ratio is {sampling_ratio!r}; it must be at most {reference.MOST_SAMPLES}")
    _check_number("gamma", gamma, (int, float), -inf, "a finite number")


def _check_number(
    name: str, value: Any, kinds: tuple[type[int] | type[float], ...], above: float, expected: str
) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is {value!r}; it must be {expected}")
    if not above < value < inf:
        raise ValueError(f"{name} is {value!r}; it must be {expected}")


def _check_batch_index(rois: Tensor, batch: int) -> None:
    if len(rois) and not batch:
        raise ValueError(f"rois has shape {list(rois.shape)}; with an input of batch size 0 there can be no RoI")
    # Numbers of Python: for a few RoIs one operation on a tensor takes longer than all of this.
    indices = rois.detach()[:, 0].tolist()
    wrong = {index for index in set(indices) if not (0 <= index < batch and index.is_integer())}
    if wrong:
        row = next(row for row, index in enumerate(indices) if index in wrong)
        raise ValueError(
            f"rois[{row}, 0] is {indices[row]:g}; it must be a batch index, a whole number from 0 to {batch - 1}, as "
            f"input has batch size {batch}"
        )


_operator = define(
    "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, int[] output_size, float spatial_scale, "
    "int sampling_ratio, float gamma, int[] group_size) -> Tensor",
    gpu=f"{__package__}.gpu",
    reference=reference.deform_roi_pool,
    check=_check,
    differentiable=("input", "offset"),
    coordinates=("rois", "offset"),
    batched=("rois", "offset"),
    rows={"grad_output": 0, "rois": 0, "offset": 0},
)
