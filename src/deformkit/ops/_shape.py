"""Small helpers on sizes: tuples per axis, the output size of a convolution, argument checks."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Proxy

from ._torch import has_storage

Boundary = Literal["zeros", "border", "reflect"]
Mode = Literal["linear", "nearest"]

# The operators take the index of a name, because a string that passes torch's stable ABI allocates memory that is never
# freed.
CHOICES = {"boundary": ("zeros", "border", "reflect"), "mode": ("linear", "nearest")}

# Sums of steps and sizes up to this stay far below the range of int64.
FARTHEST = 2**40

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ntuple(value: int | Sequence[int], axes: int, name: str, least: int) -> list[int]:
    """Return ``value`` as a list of ``axes`` integers, each at least ``least``."""
    values: list[Any]
    if type(value) is int:
        values = [value] * axes
    else:
        several: Any = value
        try:
            # A size that a program of torch.export leaves open stays so.
            values = [v if type(v) is int or isinstance(v, torch.SymInt) else int(v.__index__()) for v in several]
        except (TypeError, AttributeError):
            raise TypeError(f"{name} is {value!r}; it must be an int or a sequence of {axes} ints") from None
        if len(values) == 1:
            values = values * axes
    if len(values) != axes:
        raise ValueError(f"{name} is {value!r}; it needs {axes} values, one for each spatial axis")
    for v in values:
        if v < least:
            raise ValueError(f"{name} is {value!r}; each value must be at least {least}")
    return values


def conv_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial size of a convolution's output, as in :class:`torch.nn.Conv2d`."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def transposed_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial size of a transposed convolution's output, as in :class:`torch.nn.ConvTranspose2d`."""
    return [
        (s - 1) * t - 2 * p + d * (k - 1) + o + 1
        for s, k, t, p, o, d in zip(size, kernel_size, stride, padding, output_padding, dilation, strict=True)
    ]


def times(size: Sequence[int]) -> str:
    """``[3, 5]`` as ``3x5``, for messages."""
    return "x".join(str(int(s)) for s in size)


def unsplit_hint(channels: int, taps: int, axes: int) -> str:
    """The end of a message about an offset of ``channels`` that seems to contain a mask as well; else empty."""
    groups, rest = divmod(channels, taps * (axes + 1))
    if rest or groups < 1:
        return ""
    offsets = groups * taps * axes
    return (
        f"; {channels} = {counted(groups, 'group')} x {counted(taps, 'tap')} x ({counted(axes, 'coordinate')} + 1 "
        "mask): if one layer predicts both, "
        f"split its output into offset [:, :{offsets}] and mask [:, {offsets}:]"
    )


def check_output_size(
    name: str,
    found: Sequence[int],
    expected: Sequence[int],
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raise a ValueError if the spatial size of ``name`` is not that of the output; say which padding would fit."""
    if list(found) != list(expected):
        hint = ""
        for fitting in ([d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True)], [0] * len(size)):
            fits = conv_output_size(size, kernel_size, stride, fitting, dilation) == list(found)
            if not hint and fits and fitting != list(padding):
                hint = f"; with padding={tuple(fitting)} instead of {tuple(padding)} it would have {times(found)}"
        raise ValueError(f"{name} has spatial size {times(found)}; the output has {times(expected)}{hint}")


def counted(count: int, noun: str) -> str:
    """``count`` and ``noun``, which gets its plural, for messages."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        hint = ". For torch.fx make this layer a leaf of the tracer" if isinstance(value, Proxy) else ""
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor{hint}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_choice(name: str, value: object, choices: Sequence[str], more: str = "") -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``; ``more`` names what else is allowed."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}{more}")


def check_floating(name: str, value: Any) -> None:
    """Raise unless ``value`` is a tensor of a dtype that the operators support."""
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be float16, bfloat16, float32 or float64")


def axes_of(name: str, field: Tensor) -> int:
    """The number of spatial axes of ``field [B, C, *S]``; raise if they are not 1 to 3."""
    check_tensor(name, field)
    if field.dim() not in (3, 4, 5):
        raise ValueError(f"{name} has shape {list(field.shape)}; it needs a batch, channels and 1, 2 or 3 spatial axes")
    return field.dim() - 2


def checked_axes(name: str, field: Tensor) -> int:
    """:func:`axes_of` for ``field``; raise if the operators do not support its dtype, or if it is empty."""
    check_floating(name, field)
    axes = axes_of(name, field)
    check_not_empty(name, field.shape[2:])
    return axes


def check_not_empty(name: str, size: Sequence[int]) -> None:
    """Raise a ValueError unless the field ``name`` has an element along each spatial axis."""
    if min(size) < 1:
        raise ValueError(f"{name} has spatial size {times(size)}; every axis must have at least one element")


def check_alike(name: str, value: Any, leader_name: str, leader: Tensor, dtype: bool = True) -> None:
    """Raise unless ``value`` is a tensor on the device of ``leader`` and, except under autocast, of its dtype."""
    check_tensor(name, value)
    if value.device != leader.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {leader.device}, as {leader_name} is")
    if dtype and value.dtype != leader.dtype and not (_autocast(value) and _autocast(leader)):
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {leader.dtype}, as {leader_name}'s")


def _autocast(value: Tensor) -> bool:
    """Whether autocast is about to change the dtype of ``value``; it leaves float64 alone."""
    kind = value.device.type
    castable = value.dtype in FLOATING and value.dtype != torch.float64
    return castable and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_stored(name: str, value: Tensor | None) -> None:
    """Raise a ValueError if the storage of ``value`` was freed, as sharding and offloading do."""
    if value is not None and value.numel() and has_storage(value):
        last = value.storage_offset() + sum((s - 1) * step for s, step in zip(value.shape, value.stride(), strict=True))
        found, needed = value.untyped_storage().nbytes(), (last + 1) * value.element_size()
        if found < needed:
            raise ValueError(f"{name} has a storage of {found} bytes; it must have {needed}: it was freed or cut")


def check_offset_dtype(offset: Tensor, beside: str, dtype: torch.dtype) -> None:
    """Raise unless offsets of this dtype are supported with ``beside`` (such as ``"an input"``) of ``dtype``."""
    if offset.dtype not in FLOATING or (offset.dtype == torch.float64) != (dtype == torch.float64):
        expected = "torch.float64" if dtype == torch.float64 else "torch.float32 or a half dtype"
        raise TypeError(f"offset has dtype {offset.dtype}; with {beside} of {dtype} it must be {expected}")


def check_offset_channels(
    offset: Tensor, mask: Tensor | None, kernel_size: Sequence[int], name: str, channels: int
) -> None:
    """Raise unless the channels of ``offset [B, og*K*N, ...]`` and ``mask [B, og*K, ...]`` fit a kernel.

    Args:
        offset: the offsets, whose channels give the number of offset groups.
        mask: the factors of the taps, or None.
        kernel_size: of each axis.
        name: of what has the channels that offset groups divide.
        channels: how many these are.
    """
    axes, taps = len(kernel_size), prod(kernel_size)
    per_group = taps * axes
    if offset.shape[1] == 0 or offset.shape[1] % per_group:
        raise ValueError(
            f"offset has {offset.shape[1]} channels; a {times(kernel_size)} kernel needs a multiple of {per_group} = "
            f"{taps} taps x {axes} coordinates{unsplit_hint(offset.shape[1], taps, axes)}"
        )
    offset_groups = offset.shape[1] // per_group
    if channels % offset_groups:
        raise ValueError(
            f"offset has {offset.shape[1]} channels, thus {offset_groups} offset groups; "
            f"they must divide {name}'s {channels} channels{unsplit_hint(offset.shape[1], taps, axes)}"
        )
    if mask is not None and mask.shape[1] != offset_groups * taps:
        raise ValueError(
            f"mask has {mask.shape[1]} channels; a {times(kernel_size)} kernel with {offset_groups} offset groups "
            f"needs {offset_groups * taps} = {offset_groups} groups x {taps} taps"
        )


def check_location_dtype(name: str, locations: Tensor, beside: str, dtype: torch.dtype) -> None:
    """Raise unless locations of this dtype are supported with ``beside`` (such as ``"a value"``) of ``dtype``."""
    expected = compute_dtype(dtype)
    if locations.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name} has dtype {locations.dtype}; it must be {expected}: in half precision a location may be off by "
            f"more than a pixel; compute it in float32, or give {name}.float()"
        )
    if locations.dtype != expected:
        raise TypeError(f"{name} has dtype {locations.dtype}; with {beside} of {dtype} it must be {expected}")


def code_of(argument: str, name: Any) -> int:
    """The index of ``name`` among the :data:`CHOICES` of ``argument``; a ValueError if it is none of them."""
    if name not in CHOICES[argument]:
        expected = " or ".join(f'"{choice}"' for choice in CHOICES[argument])
        raise ValueError(f"{argument} is {name!r}; it must be {expected}")
    return CHOICES[argument].index(name)


def name_of(argument: str, code: int) -> str:
    """The inverse of :func:`code_of`."""
    if not 0 <= code < len(CHOICES[argument]):
        expected = " or ".join(f'{i} ("{choice}")' for i, choice in enumerate(CHOICES[argument]))
        raise ValueError(f"{argument} is {code}; it must be {expected}")
    return CHOICES[argument][code]


def checked_output_size(
    name: str,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """:func:`conv_output_size` for the field ``name``; a ValueError if the output or the field is empty."""
    check_window(name, size, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    out_size = conv_output_size(size, kernel_size, stride, padding, dilation)
    if min(out_size) < 1:
        raise ValueError(
            f"output size is {times(out_size)}, from {name} {times(size)}, kernel {times(kernel_size)}, "
            f"stride {times(stride)}, padding {times(padding)}, dilation {times(dilation)}; "
            "it must be at least 1 on every axis"
        )
    return out_size


def check_window(name: str, size: Sequence[int], **window: Sequence[int]) -> None:
    """Raise a ValueError if the field ``name`` is empty, or if an argument of ``window`` does not fit it."""
    for what, values in window.items():
        least = 0 if "padding" in what else 1
        if len(values) != len(size) or min(values) < least:
            raise ValueError(f"{what} is {list(values)}; it needs {len(size)} values of at least {least}")
        if max(values) > FARTHEST:
            raise ValueError(f"{what} is {list(values)}; each value must be at most 2^40")
    check_not_empty(name, size)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates and sums: float64 for float64, float32 for all other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = [
    "CHOICES",
    "FARTHEST",
    "FLOATING",
    "Boundary",
    "Mode",
    "axes_of",
    "check_alike",
    "check_choice",
    "check_count",
    "check_floating",
    "check_location_dtype",
    "check_not_empty",
    "check_offset_channels",
    "check_offset_dtype",
    "check_output_size",
    "check_stored",
    "check_tensor",
    "check_window",
    "checked_axes",
    "checked_output_size",
    "code_of",
    "compute_dtype",
    "conv_output_size",
    "counted",
    "name_of",
    "ntuple",
    "prod",
    "times",
    "transposed_output_size",
    "unsplit_hint",
]
