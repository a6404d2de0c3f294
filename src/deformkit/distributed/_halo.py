"""Rows of a tensor that lie on other ranks: which of them a rank needs, and their exchange."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Rows = tuple[int, int]
"""The rows from the first up to, and without, the second."""


def cuts(length: int, ranks: int) -> list[Rows]:
    """The rows of each rank, as DTensor cuts a tensor."""
    step = -(-length // ranks)
    return list(pairwise(min(rank * step, length) for rank in range(ranks + 1)))


def touched(positions: Tensor, length: int, boundary: str) -> Tensor:
    """The first and the last row, as ``[2]``, that samples at ``positions`` are interpolated from.

    The first is larger than the last if there is none. What a NaN position would read is not needed.
    """
    low = positions.detach().floor().flatten()
    counts = ~low.isnan()
    if boundary == "zeros":
        counts &= (low >= -1) & (low < length)
    none = torch.tensor([length, -1], device=low.device)
    lowest = torch.cat([torch.where(counts, low.clamp(0, length - 1), length), none[:1]]).amin()
    highest = torch.cat([torch.where(counts, (low + 1).clamp(0, length - 1), -1), none[1:]]).amax()
    if boundary == "reflect":
        # Mirror images may lie anywhere.
        leaves = (counts & ((low < 0) | (low >= length - 1))).any()
        lowest, highest = torch.where(leaves, 0, lowest), torch.where(leaves, length - 1, highest)
    return torch.stack([lowest, highest]).long()


def of_all_ranks(rows: Tensor, mesh: DeviceMesh, axis: int) -> list[list[int]]:
    """What every rank along an axis of the mesh has found; the first of them first."""
    # all_gather_single is the newer name.
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    found: list[list[int]] = gather(rows.unsqueeze(0), 0, (mesh, axis)).tolist()
    return found


def exchange(part: Tensor, axis: int, length: int, wanted: Sequence[Rows], mesh: DeviceMesh, mesh_axis: int) -> Tensor:
    """The rows that this rank wants of a tensor that is cut along ``axis``; differentiable.

    Args:
        part: the rows of this rank.
        axis: the axis of rows.
        length: the number of rows on all ranks.
        wanted: the rows that each rank wants.
        mesh: the ranks, with
        mesh_axis: the axis along which they have the rows.
    """
    me, owned = mesh.get_local_rank(mesh_axis), cuts(length, len(wanted))
    rows = part.movedim(axis, 0)
    sent = [_common(rows_of_other, owned[me]) for rows_of_other in wanted]
    received = [_common(wanted[me], rows_of_other) for rows_of_other in owned]
    parcels = torch.cat([rows[first - owned[me][0] : last - owned[me][0]] for first, last in sent])
    incoming, outgoing = ([last - first for first, last in some] for some in (received, sent))
    result = collectives.all_to_all_single_autograd(parcels.contiguous(), incoming, outgoing, (mesh, mesh_axis))
    return result.movedim(0, axis)


def _common(one: Rows, other: Rows) -> Rows:
    first = max(one[0], other[0])
    return first, max(first, min(one[1], other[1]))


def collect(whole: Tensor, axis: int, length: int, mesh: DeviceMesh, mesh_axis: int) -> Tensor:
    """This rank's rows of the sum of ``whole`` over all ranks, where they are cut along ``axis``; differentiable."""
    owned = cuts(length, mesh.size(mesh_axis))
    first, last = owned[mesh.get_local_rank(mesh_axis)]
    outgoing = [last_of_other - first_of_other for first_of_other, last_of_other in owned]
    rows = whole.movedim(axis, 0).contiguous()
    summands = collectives.all_to_all_single_autograd(rows, [last - first] * len(owned), outgoing, (mesh, mesh_axis))
    return summands.unflatten(0, (len(owned), last - first)).sum(0).movedim(0, axis)
