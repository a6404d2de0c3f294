"""Converts state-dicts of published layers to the order of taps and coordinates that deformkit uses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops._shape import ntuple
from ..ops.deform_aggregate.op import tap_count


def dcnv3_state_dict(
    published: Mapping[str, Tensor],
    *,
    kernel_size: int | Sequence[int],
    group: int,
    remove_center: bool = False,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Convert a state-dict of the published DCNv3 to the order of :class:`deformkit.nn.DCNv3`, or back.

    The published layer has its taps in column-major order and its offsets as (x, y); ours has taps in row-major order
    and offsets as (h, w). The rows of the heads ``offset`` and ``mask`` are permuted accordingly; all other entries are
    unchanged. The function is its own inverse.

    Args:
        published: the state-dict of the layer or of a whole network.
        kernel_size: kernel size of the layer, which must be square.
        group: ``group`` of the layer.
        remove_center: ``remove_center`` of the layer.
        prefix: the prefix of the names of the layer's entries, such as ``"levels.0.blocks.1.dcn."``.

    Returns:
        A new dictionary with all entries of ``published``.

    Raises:
        ValueError: an entry is missing or has the wrong size; the message names it.

    Example:
        >>> import torch
        >>> from deformkit.nn import DCNv3
        >>> network = torch.nn.Sequential(DCNv3(64, group=4), DCNv3(64, group=8))
        >>> state = network.state_dict()  # in place of torch.load(...) of a published checkpoint
        >>> for name, layer in network.named_modules():
        ...     if isinstance(layer, DCNv3):
        ...         options = {"kernel_size": layer.kernel_size, "group": layer.group, "prefix": name + "."}
        ...         state = dcnv3_state_dict(state, **options, remove_center=layer.remove_center)
        >>> network.load_state_dict(state)
        <All keys matched successfully>
    """
    taps = _transposed_taps(kernel_size, remove_center)
    offset = torch.stack([2 * taps + 1, 2 * taps], -1).flatten()
    return _permute_heads(published, prefix, group, {"offset": offset, "mask": taps}, multiple_of=1)


def dcnv4_state_dict(
    published: Mapping[str, Tensor],
    *,
    kernel_size: int | Sequence[int],
    group: int,
    remove_center: bool = False,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Convert a state-dict of the published DCNv4 to the order of :class:`deformkit.nn.DCNv4`, or back.

    This is :func:`dcnv3_state_dict` for the single head ``offset_mask``; the unused rows at its end are unchanged.

    Args:
        published: the state-dict of the layer or of a whole network.
        kernel_size: kernel size of the layer, which must be square.
        group: ``group`` of the layer.
        remove_center: ``remove_center`` of the layer.
        prefix: the prefix of the names of the layer's entries.

    Returns:
        A new dictionary with all entries of ``published``.

    Raises:
        ValueError: an entry is missing or has the wrong size; the message names it.

    Example:
        >>> from deformkit.nn import DCNv4
        >>> layer = DCNv4(64, group=4)
        >>> published = dcnv4_state_dict(layer.state_dict(), kernel_size=3, group=4)
        >>> layer.load_state_dict(dcnv4_state_dict(published, kernel_size=3, group=4))
        <All keys matched successfully>
    """
    taps = _transposed_taps(kernel_size, remove_center)
    offset = torch.stack([2 * taps + 1, 2 * taps], -1).flatten()
    packed = torch.cat([offset, 2 * len(taps) + taps])
    return _permute_heads(published, prefix, group, {"offset_mask": packed}, multiple_of=8)


def _transposed_taps(kernel_size: int | Sequence[int], remove_center: bool) -> Tensor:
    """The column-major number of each tap in row-major order; the permutation is its own inverse."""
    height, width = ntuple(kernel_size, 2, "kernel_size", 1)
    if height != width:
        raise ValueError(f"kernel_size is {height}x{width}; the published layers have square kernels")
    count = tap_count([height, width], remove_center)
    taps = torch.arange(height * width).reshape(height, width).T.flatten()
    if remove_center:
        middle = count // 2
        taps = taps[taps != middle]
        taps = taps - (taps > middle).long()
    return taps


def _permute_heads(
    published: Mapping[str, Tensor], prefix: str, group: int, heads: dict[str, Tensor], multiple_of: int
) -> dict[str, Tensor]:
    """Permute the rows of linear layers, in every group alike; rows after the last group are unchanged."""
    result = dict(published)
    for head, rows in heads.items():
        used = group * len(rows)
        expected = -(-used // multiple_of) * multiple_of
        order = torch.arange(expected)
        order[:used] = (torch.arange(group).unsqueeze(1) * len(rows) + rows).flatten()
        for name in (f"{prefix}{head}.weight", f"{prefix}{head}.bias"):
            if name not in published:
                raise ValueError(f"published has no entry {name!r}")
            if published[name].shape[0] != expected:
                raise ValueError(f"{name} has {published[name].shape[0]} rows; with group={group} it needs {expected}")
            result[name] = published[name][order.to(published[name].device)]
    return result
