"""The interpolation functions of dc1d, which sample the taps of deformed windows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops._shape import (
    Boundary,
    check_floating,
    check_tensor,
    compute_dtype,
    conv_output_size,
    ntuple,
)
from ...ops.deform_conv.op import deform_conv1d

__all__ = ["efficient_linterpolate", "full_seq_linterpolate", "kernel_width_linterpolate", "output_length"]


# dc1d stores one number where torch's layers have a sequence with one for each axis.
Single = int | Sequence[int]

_GATHER_LERPS = ("auto", "autograd", "recompute", "save-diff")


def output_length(length: int, kernel_size: Single, dilation: Single = 1, stride: Single = 1) -> int:
    """The number of positions of a convolution over ``length`` elements without padding; 0 if the window is longer.

    Example:
        >>> output_length(128, 16, dilation=3)
        83
    """
    window = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    checked = {name: ntuple(value, 1, name, 1) for name, value in window.items()}
    return max(0, conv_output_size([length], padding=[0], **checked)[0])


def efficient_linterpolate(
    x: Tensor,
    offsets: Tensor,
    kernel_size: Single,
    dilation: Single,
    stride: Single,
    dilated_positions: Tensor | None = None,
    device: torch.device | str | None = None,
    _test: bool = False,
    unconstrained: bool = False,
    gather_lerp: str | None = None,
) -> Tensor:
    """Sample the taps of deformed windows by linear interpolation.

    ``output[b, c, o, k] = sample(x[b, c], stride*o + clamp(dilation*k + offsets[b, g, o, k], 0, dilation*(K-1)))``

    where g is the offset group of channel c. The clamp keeps a tap in its window; without it a point beyond the
    sequence takes the value of the nearest element.

    Args:
        x: ``[B, C, L]``.
        offsets: ``[B, G, Lout, K]`` in elements; G divides C, and Lout is :func:`output_length` of L.
        kernel_size: K, number of taps; like the dilation and the stride, it may be a sequence of one number.
        dilation: distance between two taps, in elements.
        stride: step of the windows, in elements.
        dilated_positions: ignored; ``dilation`` has the same information.
        device: ignored; everything is on the device of ``x``.
        _test: ignored.
        unconstrained: whether to omit the clamp.
        gather_lerp: checked, and otherwise ignored: dc1d's ways to compute the same gradient.

    Returns:
        ``[B, C, Lout, K]`` in the dtype of ``x``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> x = torch.tensor([[[10.0, 20.0, 30.0, 40.0]]])
        >>> offsets = torch.tensor([[[[0.5, 5.0], [-3.0, 0.0], [0.0, 0.0]]]])
        >>> efficient_linterpolate(x, offsets, kernel_size=2, dilation=1, stride=1)
        tensor([[[[15., 20.],
                  [20., 30.],
                  [30., 40.]]]])
        >>> efficient_linterpolate(x, offsets, kernel_size=2, dilation=1, stride=1, unconstrained=True)[0, 0, :2]
        tensor([[15., 40.],
                [10., 30.]])
    """
    if gather_lerp is not None and gather_lerp not in _GATHER_LERPS:
        raise ValueError(
            f"unknown gather/lerp implementation: gather_lerp is {gather_lerp!r}; it must be one of "
            f"{', '.join(map(repr, _GATHER_LERPS))} or None"
        )
    return _taps(x, offsets, kernel_size, dilation, stride, not unconstrained, "border")


def full_seq_linterpolate(
    x: Tensor,
    offsets: Tensor,
    kernel_size: Single,
    dilation: Single,
    stride: Single,
    dilated_positions: Tensor | None = None,
    device: torch.device | str | None = None,
    _test: bool = False,
) -> Tensor:
    """Like :func:`efficient_linterpolate`, but taps may leave their window and are 0 outside the sequence.

    Example:
        >>> x = torch.tensor([[[10.0, 20.0, 30.0, 40.0]]])
        >>> offsets = torch.tensor([[[[0.5, 2.5], [-3.0, 0.0], [0.0, 0.0]]]])
        >>> full_seq_linterpolate(x, offsets, kernel_size=2, dilation=1, stride=1)[0, 0, :2]
        tensor([[15., 20.],
                [ 0., 30.]])
    """
    return _taps(x, offsets, kernel_size, dilation, stride, False, "zeros")


def kernel_width_linterpolate(
    x: Tensor,
    offsets: Tensor,
    kernel_size: Single,
    dilation: Single,
    stride: Single,
    dilated_positions: Tensor | None = None,
    device: torch.device | str | None = None,
    _test: bool = False,
    _max_memory: bool = True,
) -> Tensor:
    """Like :func:`efficient_linterpolate` with taps that stay in their window.

    Example:
        >>> kernel_width_linterpolate(torch.rand(2, 8, 50), torch.rand(2, 4, 46, 3), 3, dilation=2, stride=1).shape
        torch.Size([2, 8, 46, 3])
    """
    return _taps(x, offsets, kernel_size, dilation, stride, True, "border")


def tap_shifts(offsets: Tensor, dilation: int, constrained: bool) -> Tensor:
    """Offsets ``[B, G, Lout, K]`` in the operator's layout ``[B, G*K, Lout]``; clamped to the window if constrained."""
    if constrained:
        # Half precision would round the bounds, and so the positions of clamped taps.
        offsets = offsets.to(compute_dtype(offsets.dtype))
        taps = torch.arange(offsets.shape[-1], device=offsets.device) * dilation
        last = dilation * (offsets.shape[-1] - 1)
        offsets = offsets.clamp((0 - taps).to(offsets.dtype), (last - taps).to(offsets.dtype))
    return offsets.transpose(2, 3).flatten(1, 2)


def coordinates(offsets: Tensor, beside: Tensor) -> Tensor:
    """``offsets`` in a dtype that fits ``beside``: float64 if and only if the values are float64."""
    if offsets.is_floating_point() and (offsets.dtype == torch.float64) != (beside.dtype == torch.float64):
        return offsets.to(compute_dtype(beside.dtype))
    return offsets


def check_offsets(offsets: Tensor, x_name: str, x: Tensor, kernel_size: int) -> None:
    """Raise unless ``x`` is ``[B, C, L]`` and ``offsets`` ``[B, G, Lout, K]`` with G that divides C."""
    check_floating(x_name, x)
    check_tensor("offsets", offsets)
    for name, value, axes in ((x_name, x, "[B, C, L]"), ("offsets", offsets, "[B, G, Lout, K]")):
        if value.dim() != axes.count(",") + 1:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be {axes}")
    if offsets.shape[0] != x.shape[0]:
        raise ValueError(f"offsets has batch size {offsets.shape[0]}; {x_name} has {x.shape[0]}")
    if offsets.shape[1] == 0 or x.shape[1] % offsets.shape[1]:
        raise ValueError(f"offsets has {offsets.shape[1]} offset groups; they must divide the {x.shape[1]} channels")
    if offsets.shape[3] != kernel_size:
        raise ValueError(f"offsets has {offsets.shape[3]} taps; kernel_size is {kernel_size}")


def _taps(
    x: Tensor,
    offsets: Tensor,
    kernel_size: Single,
    dilation: Single,
    stride: Single,
    constrained: bool,
    boundary: Boundary,
) -> Tensor:
    """``[B, C, Lout, K]``: a convolution of each channel with K kernels; the k-th is 1 at tap k and 0 elsewhere."""
    numbers = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    kernel_size, dilation, stride = (ntuple(value, 1, name, 1)[0] for name, value in numbers.items())
    check_offsets(offsets, "x", x, kernel_size)
    expected = output_length(x.shape[2], kernel_size, dilation, stride)
    if offsets.shape[2] != expected:
        raise ValueError(
            f"offsets has {offsets.shape[2]} positions; x of length {x.shape[2]} has {expected} windows, with "
            f"kernel_size={kernel_size}, dilation={dilation}, stride={stride}"
        )
    shift = tap_shifts(coordinates(offsets, x), dilation, constrained)
    weight = torch.eye(kernel_size, dtype=x.dtype, device=x.device).repeat(x.shape[1], 1).unsqueeze(1)
    read = deform_conv1d(x, shift, weight, None, stride, 0, dilation, boundary=boundary)
    return read.unflatten(1, (-1, kernel_size)).transpose(2, 3)
