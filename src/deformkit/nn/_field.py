"""Fields of positions and displacements: what layers of warping, splatting and lookups have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._shape import check_alike, check_floating, check_not_empty, compute_dtype


def positions(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The positions of all pixels, ``[*size, N]``: the index of each, in tensor-axis order.

    They lie in memory as a displacement ``[N, *size]`` does, so that a sum of both needs no copy.
    """
    along = [torch.arange(length, dtype=dtype, device=device) for length in size]
    return torch.stack(torch.meshgrid(*along, indexing="ij")).movedim(0, -1)


def moved_positions(name: str, displacement: Tensor, input: Tensor) -> Tensor:
    """Where ``displacement [B, N, *S]`` moves each pixel of ``input [B, C, *S]``: points ``[B, 1, *S, N]``.

    Args:
        name: of the displacement, for messages.
        displacement: in pixels, in tensor-axis order.
        input: the field that is moved, already checked.
    """
    size = list(input.shape[2:])
    check_floating(name, displacement)
    check_alike(name, displacement, "input", input, dtype=False)
    if (displacement.dtype == torch.float64) != (input.dtype == torch.float64):
        expected_dtype = "torch.float64" if input.dtype == torch.float64 else "torch.float32 or a half dtype"
        raise TypeError(
            f"{name} has dtype {displacement.dtype}; with an input of {input.dtype} it must be {expected_dtype}"
        )
    expected = [input.shape[0], len(size), *size]
    if list(displacement.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(displacement.shape)}; with input of shape {list(input.shape)} it must be "
            f"{expected}"
        )
    dtype = compute_dtype(input.dtype)
    return (displacement.to(dtype).movedim(1, -1) + positions(size, dtype, input.device)).unsqueeze(1)


def check_field(name: str, field: Tensor, axes: Sequence[int]) -> None:
    """Raise unless ``field`` is a floating ``[B, C, *S]`` whose number of spatial axes is one of ``axes``."""
    check_floating(name, field)
    if field.dim() - 2 not in axes:
        counts = " or ".join(str(count + 2) for count in axes)
        raise ValueError(f"{name} has shape {list(field.shape)}; it must have {counts} axes: batch, channels, space")
    check_not_empty(name, field.shape[2:])
