"""``grid_sample`` with torch's signature, on deformable sampling."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._shape import Boundary, Mode, axes_of, check_alike, check_choice, check_floating, compute_dtype
from ..ops.deform_sample.op import deform_sample


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.grid_sample` by :func:`deformkit.deform_sample`: same values and gradients.

    Args:
        input: ``[B, C, H, W]`` or ``[B, C, D, H, W]``; also ``[B, C, L]``, which torch does not accept.
        grid: ``[B, *out, N]``, **x first**, -1 to 1 over the input. ``*out`` has any number of axes.
        mode: ``"bilinear"``, which is trilinear for volumes, or ``"nearest"``. ``"bicubic"`` is computed by torch.
        padding_mode: ``"zeros"``, ``"border"`` or ``"reflection"``.
        align_corners: whether -1 and 1 are the centres of the end pixels, or their outer edges. None is False.

    Returns:
        ``[B, C, *out]`` in the dtype of ``input``. Coordinates are computed in float32, or float64 for float64, also
        where ``grid`` is in half precision. Unlike in torch, a NaN in ``grid`` gives NaN.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> input, grid = torch.randn(1, 3, 8, 9), 2 * torch.rand(1, 5, 6, 2) - 1
        >>> ours = grid_sample(input, grid, align_corners=False)
        >>> torch.allclose(ours, torch.nn.functional.grid_sample(input, grid, align_corners=False), atol=1e-5)
        True
    """
    if mode == "bicubic":
        return F.grid_sample(input, grid, mode, padding_mode, bool(align_corners))
    check_choice("mode", mode, ("bilinear", "nearest"), " or 'bicubic'")
    check_choice("padding_mode", padding_mode, ("zeros", "border", "reflection"))
    check_floating("input", input)
    check_floating("grid", grid)
    check_alike("grid", grid, "input", input, dtype=False)
    axes = axes_of("input", input)
    if grid.dim() < 2 or grid.shape[-1] != axes or grid.shape[0] != input.shape[0]:
        raise ValueError(
            f"grid has shape {list(grid.shape)}; with input of shape {list(input.shape)} it must be "
            f"[{input.shape[0]}, *out, {axes}]"
        )
    points = _pixels(grid.to(compute_dtype(input.dtype)), input, bool(align_corners))
    return sample_pixels(input, points, mode, padding_mode, bool(align_corners))


def sample_pixels(input: Tensor, points: Tensor, mode: str, padding_mode: str, align_corners: bool) -> Tensor:
    """:func:`grid_sample` at points ``[B, *out, N]`` in pixels, in tensor-axis order; the arguments are checked."""
    boundary: Boundary = "border" if padding_mode == "border" else "zeros"
    if padding_mode == "reflection":
        # Mirrored at the outer edges by the operator, but at the centres of the end pixels here.
        boundary = "border" if align_corners else "reflect"
        points = _mirrored(points, input) if align_corners else points
    ours: Mode = "linear"
    if mode == "nearest":
        # Half-way between two pixels torch takes the even one.
        ours, points = "nearest", points.round()
    return deform_sample(input, points.unsqueeze(1), boundary=boundary, mode=ours)


def _pixels(grid: Tensor, input: Tensor, align_corners: bool) -> Tensor:
    """The points in pixels, in tensor-axis order."""
    size = grid.new_tensor(list(input.shape[2:])).reshape(-1, *[1] * (grid.dim() - 2))
    # Axis by axis, as the kernels read them best; in place, for fresh memory takes longer than the sums.
    points = torch.stack(grid.unbind(-1)[::-1], 1).add_(1)
    points = points.mul_((size - 1) / 2) if align_corners else points.mul_(size / 2).sub_(0.5)
    return points.movedim(1, -1)


def _mirrored(points: Tensor, input: Tensor) -> Tensor:
    """Points mirrored at the centres of the first and the last pixel."""
    last = points.new_tensor(list(input.shape[2:])) - 1
    period = (2 * last).clamp(min=1)
    place = points.abs().remainder(period)
    return torch.where(last == 0, points * 0, torch.where(place > last, period - place, place))
