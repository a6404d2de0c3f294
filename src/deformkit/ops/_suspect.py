"""Warnings about arguments that are legal and nearly always a mistake.

The values of tensors reveal them. They are read only if this is cheap, on the CPU and outside of tracing: on a GPU it
would wait for the device.
"""

import warnings

import torch
from torch import Tensor

from ._torch import tracing, wrapped

# The number of further calls whose values are checked: such a mistake shows in the first calls, and repeats itself.
looks_left = {"rois": 64, "locations": 8}

# The kinds of warnings that were given; each is given once in a process.
given: set[str] = set()

_QUERIES = 64
_SEVERAL = 0.35


def readable(value: Tensor) -> bool:
    """Whether reading the values is cheap: they are on the CPU, and neither traced nor transformed."""
    eager = not torch.compiler.is_compiling() and not tracing()
    return eager and value.device.type == "cpu" and type(value) is Tensor and not wrapped(value)


def warn_of_inverted_rois(rois: Tensor) -> None:
    """Warn if a region of ``rois [R, 1 + 2N]`` ends before it begins."""
    if not looks_left["rois"] or "inverted" in given or not readable(rois):
        return
    looks_left["rois"] -= 1
    low, high = rois.detach()[:, 1:].chunk(2, 1)
    if not (high < low).any():
        return
    inverted = (high < low) & low.isfinite() & high.isfinite()
    if inverted.any():
        row = int(inverted.any(1).nonzero()[0])
        corners = ", ".join(f"{value:g}" for value in rois[row, 1:].tolist())
        _warn(
            "inverted",
            f"{int(inverted.any(1).sum())} of {len(rois)} RoIs are inverted, such as rois[{row}] with the corners "
            f"({corners}): the second corner must not be smaller than the first. Boxes given as centre and size, or as "
            "corner and size, have to be converted to two corners, x first",
        )


def warn_of_gradient(name: str, value: Tensor) -> None:
    """Warn if ``value``, which gets no gradient, asks for one."""
    wanted = value.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if wanted and "gradient" not in given:
        _warn("gradient", f"{name} requires a gradient and gets none; pass {name}.detach() if that is intended")


def warn_of_location_units(locations: Tensor) -> None:
    """Warn if the normalised ``locations [B, Q, H, P, N]`` look like pixels, or like grid_sample's -1 to 1."""
    if not looks_left["locations"] or not locations.numel() or not readable(locations):
        return
    looks_left["locations"] -= 1
    found = location_units(locations.detach())
    if found is not None:
        _warn(*found)


def location_units(locations: Tensor) -> tuple[str, str] | None:
    """If the normalised ``locations [B, Q, H, P, N]`` look like other units: the kind of mistake and its message."""
    some = locations[:, :: -(-locations.shape[1] // _QUERIES)]
    far = ((some < -1) | (some > 2)).any(-1)
    if far.double().mean() > 0.5:
        return (
            "pixels",
            f"{int(far.sum())} of {far.numel()} sampling_locations lie farther outside their level than it is long. "
            "They must be normalised, 0 to 1 over each level: are these pixels? Divide (pixel + 0.5) by the level's "
            "size, x first",
        )
    if (some < 0).double().mean() > _SEVERAL and -1.05 < some.min() < -0.5 and some.max() < 1.05:
        return (
            "-1 to 1",
            f"{int((some < 0).sum())} of {some.numel()} coordinates in sampling_locations are negative, down to "
            f"{some.min():.2f}. They must be normalised, 0 to 1 over each level: are these -1 to 1, as grid_sample "
            "takes them? Pass (locations + 1) / 2",
        )
    return None


def _warn(kind: str, message: str) -> None:
    given.add(kind)
    # The caller of the public function, which is decorated and calls one of the functions above.
    warnings.warn(message, UserWarning, stacklevel=5)
