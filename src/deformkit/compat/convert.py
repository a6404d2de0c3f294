"""State-dicts of host libraries for the layers of deformkit, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..nn import dcnv3_state_dict, dcnv4_state_dict
from ..ops._shape import prod, times

__all__ = [
    "dcnv3_state_dict",
    "dcnv4_state_dict",
    "from_mmcv",
    "from_torchvision",
    "rename_offset_heads",
    "to_mmcv",
]


def from_mmcv(published: Mapping[str, Tensor], *, modulated: bool, prefix: str = "") -> dict[str, Tensor]:
    """A state-dict of mmcv's packed convolution as one of :class:`deformkit.nn.PackedDeformConv2d`.

    What mmcv calls ``conv_offset`` is our ``offset_head``, with the same order of channels. mmcv's mask is
    ``sigmoid(logit)``, ours is twice that: with ``modulated`` the weight of the convolution is halved, which rounds
    nothing, so that the outputs are equal.

    Args:
        published: names and values, of the layer alone or of a whole network. The head may also have the name
            ``conv_offset_mask``, as in the DCNv2 of CenterNet, or lie beside the layer, as in mmcv before version 2:
            ``conv2_offset`` for a layer ``conv2``.
        modulated: whether the layer predicts a mask: True for ``ModulatedDeformConv2dPack``, False for
            ``DeformConv2dPack``, whose counterpart here has ``bias=False``.
        prefix: what the names of the layer's entries begin with, such as ``"layer2.0.conv2."``.

    Returns:
        A new dictionary with all entries of ``published``, those of the layer by our names.

    Raises:
        ValueError: an entry is missing or has the wrong size; the message names it.

    Example:
        >>> from deformkit.compat.mmcv import ModulatedDeformConv2dPack
        >>> from deformkit.nn import PackedDeformConv2d
        >>> published = ModulatedDeformConv2dPack(8, 16, 3, padding=1).state_dict()
        >>> layer = PackedDeformConv2d(8, 16, 3, padding=1, modulated=True)
        >>> layer.load_state_dict(from_mmcv(published, modulated=True))
        <All keys matched successfully>
    """
    heads = [f"{prefix}conv_offset", f"{prefix}conv_offset_mask", *([f"{prefix[:-1]}_offset"] if prefix else [])]
    head = next((name for name in heads if f"{name}.weight" in published), heads[0])
    result = _rename_head(published, prefix, head, f"{prefix}offset_head", modulated)
    if modulated:
        result[f"{prefix}weight"] = published[f"{prefix}weight"] / 2
    return result


def to_mmcv(state: Mapping[str, Tensor], *, modulated: bool, prefix: str = "") -> dict[str, Tensor]:
    """The inverse of :func:`from_mmcv`: a state-dict of ours by mmcv's names, with a weight for mmcv's mask.

    Args:
        state: names and values, of the layer alone or of a whole network.
        modulated: whether the layer predicts a mask.
        prefix: what the names of the layer's entries begin with.

    Returns:
        A new dictionary with all entries of ``state``, those of the layer by mmcv's names.

    Raises:
        ValueError: an entry is missing or has the wrong size; the message names it.

    Example:
        >>> from deformkit.nn import PackedDeformConv2d
        >>> sorted(to_mmcv(PackedDeformConv2d(8, 16, 3, bias=False).state_dict(), modulated=False))
        ['conv_offset.bias', 'conv_offset.weight', 'weight']
    """
    result = _rename_head(state, prefix, f"{prefix}offset_head", f"{prefix}conv_offset", modulated)
    if modulated:
        result[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
    return result


def rename_offset_heads(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state-dict of mmcv before version 2 by the names of today: ``conv2_offset`` becomes ``conv2.conv_offset``.

    The layers of :mod:`deformkit.compat.mmcv` do this themselves where the loader hands them the whole state-dict, as
    mmengine does; :meth:`torch.nn.Module.load_state_dict` hands on only what is below a layer's own name.

    Args:
        published: names and values of a network. A head is an entry ``<layer>_offset.weight`` or ``.bias`` beside a
            four-dimensional ``<layer>.weight``, where the layer has no ``conv_offset`` yet.

    Returns:
        A new dictionary with all entries of ``published``.

    Example:
        >>> import torch
        >>> names = ["conv2.weight", "conv2_offset.weight", "conv2_offset.bias", "bn2.weight"]
        >>> list(rename_offset_heads({name: torch.zeros(1, 1, 3, 3) for name in names}))
        ['conv2.weight', 'conv2.conv_offset.weight', 'conv2.conv_offset.bias', 'bn2.weight']
    """
    result = {}
    for name, value in published.items():
        for part in ("weight", "bias"):
            layer = name.removesuffix(f"_offset.{part}")
            weight, new = published.get(f"{layer}.weight"), f"{layer}.conv_offset.{part}"
            if layer != name and weight is not None and weight.dim() == 4 and new not in published:
                name = new
        result[name] = value
    return result


def from_torchvision(
    published: Mapping[str, Tensor],
    *,
    conv: str,
    offset: str,
    mask: str | None = None,
    mask_factor: float = 1.0,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The state-dict of a packed layer made by hand around torchvision as one of ours.

    torchvision has no packed layer; many programs combine a plain convolution for the offsets, one for the mask, and
    ``deform_conv2d``. Here they become the ``offset_head`` and the weight of
    :class:`deformkit.nn.PackedDeformConv2d`. (``torchvision.ops.DeformConv2d`` itself needs no conversion: the
    state-dict of :class:`deformkit.nn.DeformConv2d` has its names.)

    Args:
        published: names and values, of the layer alone or of a whole network.
        conv: name of the convolution that is deformed, below ``prefix``.
        offset: name of the convolution that gives the offsets.
        mask: name of the convolution that gives the logits of the mask, or None where there is no mask.
        mask_factor: c, where the mask is ``c * sigmoid(logit)``; the weight is multiplied by c/2, as ours is
            ``2 * sigmoid(logit)``.
        prefix: what the names of the layer's entries begin with.

    Returns:
        A new dictionary with all entries of ``published``, those of the layer by our names.

    Raises:
        ValueError: an entry is missing or has the wrong size; the message names it.

    Example:
        >>> from torch.nn import Conv2d, Module
        >>> from deformkit.nn import PackedDeformConv2d
        >>> by_hand = Module()
        >>> by_hand.offset_conv = Conv2d(8, 18, 3, padding=1)
        >>> by_hand.mask_conv = Conv2d(8, 9, 3, padding=1)
        >>> by_hand.regular_conv = Conv2d(8, 16, 3, padding=1)
        >>> names = {"conv": "regular_conv", "offset": "offset_conv", "mask": "mask_conv"}
        >>> state = from_torchvision(by_hand.state_dict(), **names)
        >>> PackedDeformConv2d(8, 16, 3, padding=1, modulated=True).load_state_dict(state)
        <All keys matched successfully>
    """
    weight = _entry(published, f"{prefix}{conv}.weight")
    taps = prod(weight.shape[2:])
    heads = {offset: 2 * taps} if mask is None else {offset: 2 * taps, mask: taps}
    parts: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for name, rows in heads.items():
        for part, values in parts.items():
            values.append(_entry(published, f"{prefix}{name}.{part}"))
            _check_rows(f"{prefix}{name}.{part}", values[-1], rows, weight)
    if mask is not None and parts["weight"][0].shape[0] != 2 * parts["weight"][1].shape[0]:
        found = [value.shape[0] for value in parts["weight"]]
        raise ValueError(f"{prefix}{mask} has {found[1]} channels; beside {found[0]} offsets it needs {found[0] // 2}")
    read = {f"{prefix}{name}.{part}" for name in (conv, *heads) for part in parts}
    result = {name: value for name, value in published.items() if name not in read}
    result[f"{prefix}weight"] = weight if mask is None else weight * (mask_factor / 2)
    if f"{prefix}{conv}.bias" in published:
        result[f"{prefix}bias"] = published[f"{prefix}{conv}.bias"]
    return result | {f"{prefix}offset_head.{part}": torch.cat(values) for part, values in parts.items()}


def _rename_head(state: Mapping[str, Tensor], prefix: str, old: str, new: str, modulated: bool) -> dict[str, Tensor]:
    """``state`` with the two entries of one head by another name, and the sizes of the layer checked."""
    weight = _entry(state, f"{prefix}weight")
    names = {f"{old}.{part}": f"{new}.{part}" for part in ("weight", "bias")}
    for name in names:
        _check_rows(name, _entry(state, name), prod(weight.shape[2:]) * (3 if modulated else 2), weight)
    return {names.get(name, name): value for name, value in state.items()}


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"there is no entry {name!r}")
    return state[name]


def _check_rows(name: str, value: Tensor, per_group: int, weight: Tensor) -> None:
    if value.shape[0] == 0 or value.shape[0] % per_group:
        raise ValueError(
            f"{name} has {value.shape[0]} rows; with a {times(weight.shape[2:])} kernel it needs a multiple of "
            f"{per_group}"
        )
