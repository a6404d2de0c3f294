"""Operators on images and volumes that are cut along a spatial axis: each rank gets the rows that its points reach."""

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn.functional import pad

from ..ops import deform_aggregate, deform_conv1d, deform_conv2d, deform_conv3d, deform_sample
from ..ops._shape import Boundary, Mode, check_choice, checked_output_size, ntuple
from ..ops.deform_aggregate.reference import points
from ._halo import Rows, cuts, exchange, of_all_ranks, touched

_CONV: dict[int, Callable[..., Tensor]] = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}
_BOUNDARIES = ("zeros", "border", "reflect")


class Division(NamedTuple):
    """How a tensor is cut along one of its spatial axes."""

    mesh: DeviceMesh
    mesh_axis: int
    axis: int
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor, first: int, axes: int) -> "Division":
        """That of a tensor whose spatial axes are the ``axes`` ones from ``first`` on."""
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a DTensor, cut along a spatial axis")
        cut = [i for i, p in enumerate(tensor.placements) if isinstance(p, Shard) and first <= p.dim < first + axes]
        others = [p for i, p in enumerate(tensor.placements) if i not in cut]
        if len(cut) != 1 or not all(p.is_replicate() or p.is_shard(0) for p in others):
            raise ValueError(
                f"{name} has placements {tensor.placements}; one of them must be Shard of an axis from {first} to "
                f"{first + axes - 1}, and the others Shard(0) or Replicate()"
            )
        placement = tensor.placements[cut[0]]
        assert isinstance(placement, Shard)
        return cls(tensor.device_mesh, cut[0], placement.dim, tensor.placements)

    @property
    def ranks(self) -> int:
        return self.mesh.size(self.mesh_axis)

    @property
    def me(self) -> int:
        return self.mesh.get_local_rank(self.mesh_axis)

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is cut in the same way."""
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return tensor.redistribute(placements=self.placements).to_local()

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that every rank needs whole; each computes a summand of its gradient."""
        everywhere = [Replicate()] * self.mesh.ndim
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, everywhere, run_check=False)
        summands = [Replicate() if p.is_replicate() else Partial() for p in self.placements]
        return tensor.redistribute(placements=everywhere).to_local(grad_placements=summands)

    def together(self, part: Tensor, length: int) -> DTensor:
        """The tensor of which this rank has ``part``, with ``length`` rows on all ranks."""
        shape = list(part.shape)
        shape[self.axis] = length
        for i, placement in enumerate(self.placements):
            if placement.is_shard(0):
                batch = torch.tensor(shape[0], device=part.device)
                shape[0] = int(collectives.all_reduce(batch, "sum", (self.mesh, i)))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def rows(self, part: Tensor, length: int, wanted: Sequence[Rows]) -> Tensor:
        return exchange(part, self.axis, length, wanted, self.mesh, self.mesh_axis)


class Window(NamedTuple):
    """The output rows of a rank, and the step, padding, dilation and taps of a kernel along the axis that is cut."""

    out: Rows
    stride: int
    padding: int
    dilation: int
    taps: int

    @property
    def outputs(self) -> int:
        return self.out[1] - self.out[0]

    def steps(self, like: Tensor, tap_axis: int, out_axis: int) -> Tensor:
        """The positions of the taps without offsets, to be added to a tensor with these axes."""
        tap, out = ([1] * like.dim() for _ in range(2))
        tap[tap_axis], out[out_axis] = -1, -1
        taps = self.dilation * torch.arange(self.taps, device=like.device)
        starts = self.stride * torch.arange(*self.out, device=like.device) - self.padding
        return taps.reshape(tap) + starts.reshape(out)

    def scaled(self, scale: float, max_offset: float) -> int:
        """How many rows beyond those of the kernel the points reach, whose distance from the centre is scaled."""
        centre = self.dilation * (self.taps - 1) // 2
        side = max(centre, self.dilation * (self.taps - 1) - centre)
        return max(0, ceil(abs(scale) * (side + max_offset)) - min(centre, side)) + 1

    def reach(self, beyond: int) -> Rows:
        """The input rows under the kernel, and ``beyond`` more on either side."""
        first = self.stride * self.out[0] - self.padding
        last = self.stride * max(self.out[1] - 1, self.out[0]) - self.padding + self.dilation * (self.taps - 1)
        return first - beyond, last + 1 + beyond

    def fitted(self, rows: Rows) -> tuple[int, int, int]:
        """What makes an operator on ``rows`` alone sample where one on all rows does.

        Returns:
            The padding of the rows, and the numbers of output rows before and after those of this rank.
        """
        extent, before = self.dilation * (self.taps - 1) + 1, 0
        while True:
            padding = self.stride * before + rows[0] - self.reach(0)[0]
            possible = (rows[1] - rows[0] + 2 * padding - extent) // self.stride + 1
            if padding >= 0 and possible >= max(before + self.outputs, 1):
                return padding, before, possible - before - self.outputs
            before += 1


def spatial_deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    boundary: Boundary = "zeros",
    max_offset: float | None = None,
) -> DTensor:
    """Deformable convolution of an image or a volume of which every rank has some rows.

    The value, every gradient and the arguments are those of :func:`deformkit.deform_conv2d`, or of its 1-D and 3-D
    forms. Each rank receives the rows of ``input`` that its own points reach: which those are is read off ``offset``,
    and differs from call to call.

    Args:
        input: ``[B, C, *S]``, a DTensor with ``Shard`` of one spatial axis on one axis of its mesh, and ``Shard(0)`` or
            ``Replicate()`` on the others.
        offset: ``[B, og*K*N, *out]``; it is divided as ``input`` is, and so is ``mask``.
        weight: ``[Cout, C/groups, *kernel]``, whole on every rank, as ``bias`` is: a tensor or a DTensor.
        bias: ``[Cout]`` or None.
        stride: step of the output positions, in pixels.
        padding: zeros that are taken to be around the input, in pixels.
        dilation: distance between two taps, in pixels.
        mask: ``[B, og*K, *out]``, or None.
        boundary: as in :func:`deformkit.deform_conv2d`. With ``"reflect"`` a rank receives all rows as soon as one of
            its points is outside.
        max_offset: the largest distance, in pixels, by which ``offset`` moves a point along the axis that is cut. The
            rows to be sent are then known beforehand, and a larger offset is an error on every rank. None: any.

    Returns:
        ``[B, Cout, *out]``, a DTensor divided as ``input`` is.

    Raises:
        TypeError: ``input`` is not a DTensor.
        ValueError: ``input`` is not cut along one spatial axis, or an offset is larger than ``max_offset``.
    """
    axes = input.dim() - 2
    division = Division.of("input", input, 2, axes)
    cut = division.axis - 2
    kernel = list(weight.shape[2:])
    kernels = _Kernels.of(division, cut, list(input.shape[2:]), kernel, stride, padding, dilation)
    offset = division.part(offset)
    own = kernels.windows[division.me]
    along = offset.unflatten(1, (-1, *kernel, axes)).select(2 + axes, cut)
    positions = along.detach() + own.steps(along, 2 + cut, 2 + axes + cut)
    beyond = None if max_offset is None else int(max_offset) + 1
    rows = kernels.rows(positions, along, boundary, max_offset, beyond)

    padding, before, after = kernels.fitted(rows)
    output = _CONV[axes](
        division.rows(division.part(input), kernels.length, rows),
        _extended(offset, division.axis, before, after),
        division.whole(weight),
        None if bias is None else division.whole(bias),
        kernels.stride,
        padding,
        kernels.dilation,
        None if mask is None else _extended(division.part(mask), division.axis, before, after),
        boundary=boundary,
    )
    return division.together(output.narrow(division.axis, before, own.outputs), kernels.out_length)


def spatial_deform_aggregate(
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    boundary: Boundary = "zeros",
    max_offset: float | None = None,
) -> DTensor:
    """Deformable aggregation of an image or a volume of which every rank has some rows.

    The value, every gradient and the arguments are those of :func:`deformkit.deform_aggregate`; see
    :func:`spatial_deform_conv` for what the ranks exchange.

    Args:
        value: ``[B, *S, H, D]``, a DTensor with ``Shard`` of one spatial axis on one axis of its mesh, and ``Shard(0)``
            or ``Replicate()`` on the others.
        offset: ``[B, *out, H, K, N]``; it is divided as ``value`` is, and so is ``weight``.
        weight: ``[B, *out, H, K]``.
        kernel_size: number of taps along each axis.
        stride: step of the output positions, in pixels.
        padding: zeros that are taken to be around the value, in pixels.
        dilation: distance between two taps, in pixels.
        offset_scale: factor that scales the distance of each point from the centre of its window.
        remove_center: whether to leave out the middle tap.
        boundary: as in :func:`spatial_deform_conv`.
        max_offset: the largest value in ``offset``, in pixels before ``offset_scale``, along the axis that is cut.

    Returns:
        ``[B, *out, H, D]``, a DTensor divided as ``value`` is.

    Raises:
        TypeError: ``value`` is not a DTensor.
        ValueError: ``value`` is not cut along one spatial axis, or an offset is larger than ``max_offset``.
    """
    axes = value.dim() - 3
    division = Division.of("value", value, 1, axes)
    cut = division.axis - 1
    kernel = ntuple(kernel_size, axes, "kernel_size", 1)
    kernels = _Kernels.of(division, cut, list(value.shape[1:-2]), kernel, stride, padding, dilation)
    offset = division.part(offset)
    own = kernels.windows[division.me]
    moved = list(kernels.padding)
    moved[cut] -= own.stride * own.out[0]
    base, shift = points(offset.detach(), kernel, kernels.stride, moved, kernels.dilation, offset_scale, remove_center)
    beyond = None if max_offset is None else own.scaled(offset_scale, max_offset)
    positions = base[..., cut] + shift[..., cut]
    rows = kernels.rows(positions, offset[..., cut], boundary, max_offset, beyond)

    new_padding, before, after = kernels.fitted(rows)
    output = deform_aggregate(
        division.rows(division.part(value), kernels.length, rows),
        _extended(offset, division.axis, before, after),
        _extended(division.part(weight), division.axis, before, after),
        kernel,
        kernels.stride,
        new_padding,
        kernels.dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
        boundary=boundary,
    )
    return division.together(output.narrow(division.axis, before, own.outputs), kernels.out_length)


def spatial_deform_sample(
    input: Tensor, points: Tensor, *, boundary: Boundary = "zeros", mode: Mode = "linear"
) -> DTensor:
    """The values at given points of an image or a volume of which every rank has some rows.

    The value and every gradient are those of :func:`deformkit.deform_sample`; a rank receives the rows that its own
    points reach.

    Args:
        input: ``[B, C, *S]``, a DTensor with ``Shard`` of one spatial axis on one axis of its mesh, and ``Shard(0)`` or
            ``Replicate()`` on the others.
        points: ``[B, G, *out, N]``, in pixels of the whole input: a DTensor that is cut along one of the axes ``*out``
            on the same axis of the mesh.
        boundary: as in :func:`spatial_deform_conv`.
        mode: ``"linear"`` or ``"nearest"``.

    Returns:
        ``[B, C, *out]``, a DTensor divided as ``points`` is.

    Raises:
        TypeError: ``input`` or ``points`` is not a DTensor.
        ValueError: one of them is not cut along one axis, or not on the same axis of the mesh.
    """
    axes = input.dim() - 2
    division = Division.of("input", input, 2, axes)
    result = Division.of("points", points, 2, points.dim() - 3)
    if result.mesh_axis != division.mesh_axis or result.mesh != division.mesh:
        raise ValueError("points is cut on another axis of the mesh than input, or on another mesh")
    own, cut, length = result.part(points), division.axis - 2, input.shape[division.axis]
    positions = own[..., cut].round() if mode == "nearest" else own[..., cut]
    rows = _rows_of(of_all_ranks(touched(positions, length, boundary), division.mesh, division.mesh_axis), length)
    first = torch.zeros(axes, dtype=own.dtype, device=own.device)
    first[cut] = rows[division.me][0]
    output = deform_sample(division.rows(division.part(input), length, rows), own - first, boundary=boundary, mode=mode)
    return result.together(output, points.shape[result.axis])


class _Kernels(NamedTuple):
    """The windows of an operator with a kernel on all ranks."""

    division: Division
    cut: int
    length: int
    out_length: int
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    windows: list[Window]

    @classmethod
    def of(
        cls,
        division: Division,
        cut: int,
        size: Sequence[int],
        kernel: Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
    ) -> "_Kernels":
        axes = len(size)
        steps = (
            ntuple(stride, axes, "stride", 1),
            ntuple(padding, axes, "padding", 0),
            ntuple(dilation, axes, "dilation", 1),
        )
        out_length = checked_output_size("input", size, kernel, *steps)[cut]
        windows = [
            Window(out, steps[0][cut], steps[1][cut], steps[2][cut], kernel[cut])
            for out in cuts(out_length, division.ranks)
        ]
        return cls(division, cut, size[cut], out_length, *steps, windows)

    def rows(
        self, positions: Tensor, offset: Tensor, boundary: Boundary, max_offset: float | None, beyond: int | None
    ) -> list[Rows]:
        """The rows that each rank needs: those that ``positions`` touch, or ``beyond`` those under its windows."""
        check_choice("boundary", boundary, _BOUNDARIES)
        mesh, axis = self.division.mesh, self.division.mesh_axis
        if max_offset is None or beyond is None:
            found = of_all_ranks(touched(positions, self.length, boundary), mesh, axis)
            return [self._with_own(window, *rows) for window, rows in zip(self.windows, found, strict=True)]
        _check_largest(offset, max_offset, mesh, axis)
        result = []
        for window in self.windows:
            first, last = window.reach(beyond)
            leaves = boundary == "reflect" and (first < 0 or last > self.length)
            result.append((0, self.length) if leaves else self._with_own(window, first, last - 1))
        return result

    def _with_own(self, window: Window, first: int, last: int) -> Rows:
        """The rows of the field from ``first`` to ``last``, and those that the kernel itself lies over.

        Without its own rows the window would not fit: see :meth:`Window.fitted`.
        """
        own_first, own_past = window.reach(0)
        lowest = max(min(first, own_first, self.length - 1), 0)
        return lowest, max(lowest + 1, min(max(last + 1, own_past), self.length))

    def fitted(self, rows: Sequence[Rows]) -> tuple[list[int], int, int]:
        """:meth:`Window.fitted` of this rank, with the padding along every axis."""
        padding = list(self.padding)
        me = self.division.me
        padding[self.cut], before, after = self.windows[me].fitted(rows[me])
        return padding, before, after


def _rows_of(touched_by_ranks: Sequence[Sequence[int]], length: int) -> list[Rows]:
    """At least one row for each rank."""
    return [
        (lowest, highest + 1) if lowest <= highest else (min(lowest, length - 1), min(lowest, length - 1) + 1)
        for lowest, highest in touched_by_ranks
    ]


def _extended(tensor: Tensor, axis: int, before: int, after: int) -> Tensor:
    """``tensor`` with zeros before and after it along an axis."""
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - axis) + [before, after])


def _check_largest(offset: Tensor, max_offset: float, mesh: DeviceMesh, axis: int) -> None:
    """Raise on every rank if an offset of one is too large."""
    exceeds = collectives.all_reduce((offset.detach().abs() > max_offset).any().int(), "max", (mesh, axis))
    if torch.compiler.is_compiling():
        torch._assert_async(exceeds == 0, f"an offset is larger than max_offset = {max_offset}")
    elif exceeds.item():
        largest = offset.detach().abs().nan_to_num(0).amax().item() if offset.numel() else 0.0
        raise ValueError(
            f"max_offset is {max_offset}; an offset along the axis that is cut is larger on a rank; on this one the "
            f"largest is {largest}"
        )
