"""Softmax splatting: forward warping that decides by a metric where several pixels arrive at one place."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..ops._shape import check_alike, check_choice, check_floating, compute_dtype
from ..ops.deform_splat.op import deform_splat
from ._field import check_field, moved_positions

SplatMode = Literal["summation", "average", "linear", "soft"]


class SoftmaxSplat(nn.Module):
    """Forward warping: every pixel moves along its flow, and where several arrive, they are weighted by a metric.

    ``output(q) = sum over o of w[o] * k(q - o - flow[o]) * input[o] / sum over o of w[o] * k(q - o - flow[o])``

    where ``k(d) = prod over n of max(0, 1 - |d[n]|)``, and ``w`` depends on the mode:

    * ``"summation"``: 1, and the sum is not divided;
    * ``"average"``: 1;
    * ``"linear"``: ``metric``;
    * ``"soft"``: ``exp(metric)``, so that pixels with a large metric, such as near ones, cover others.

    Where nothing arrives the output is 0. In mode ``"soft"`` the largest metric of an image is subtracted first, which
    changes nothing but prevents an overflow; a pixel about 80 or more below it counts as absent in float32.

    Args:
        mode: see above.

    Shapes of ``forward(input, flow, metric=None)``:
        ``input [B, C, H, W]``; ``flow [B, 2, H, W]`` in pixels, **in tensor-axis order**: channel 0 along h and channel
        1 along w. Published flow is (x, y) and given as ``flow.flip(1)``. ``metric [B, 1, H, W]``, in the modes
        ``"linear"`` and ``"soft"``. Output ``[B, C, H, W]`` in the dtype of ``input``. Sequences ``[B, C, L]`` with a
        flow of 1 channel and volumes ``[B, C, D, H, W]`` with one of 3 are also accepted.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape or device does not fit, or ``metric`` is missing or not used; the message names the
            argument.

    Example:
        >>> import torch
        >>> frame, flow, metric = torch.randn(2, 3, 32, 48), torch.randn(2, 2, 32, 48), torch.randn(2, 1, 32, 48)
        >>> SoftmaxSplat()(frame, flow, metric).shape
        torch.Size([2, 3, 32, 48])

    Paper: Softmax Splatting for Video Frame Interpolation, https://arxiv.org/abs/2003.05534.
    """

    def __init__(self, mode: SplatMode = "soft") -> None:
        super().__init__()
        check_choice("mode", mode, ("summation", "average", "linear", "soft"))
        self.mode = mode

    def forward(self, input: Tensor, flow: Tensor, metric: Tensor | None = None) -> Tensor:
        """Move every pixel of ``input`` by ``flow``."""
        check_field("input", input, [1, 2, 3])
        points, size = moved_positions("flow", flow, input), input.shape[2:]
        if self.mode == "summation":
            self._check_metric(input, metric)
            return deform_splat(input, points, size)
        weight = self._weight(input, metric)
        weighted = torch.cat([input.to(weight.dtype) * weight, weight], 1)
        total, weights = deform_splat(weighted, points, size).split([input.shape[1], 1], 1)
        # The gradient of a quotient would take three more passes over all channels.
        return (total * weights.masked_fill(weights == 0, 1.0).reciprocal()).to(input.dtype)

    def extra_repr(self) -> str:
        """The argument of the constructor."""
        return f"mode={self.mode!r}"

    def _weight(self, input: Tensor, metric: Tensor | None) -> Tensor:
        """The weight of each pixel, ``[B, 1, *S]``."""
        self._check_metric(input, metric)
        dtype = compute_dtype(input.dtype)
        if metric is None:
            return torch.ones_like(input[:, :1], dtype=dtype)
        metric = metric.to(dtype)
        if self.mode == "linear":
            return metric
        return (metric - metric.detach().amax(list(range(1, metric.dim())), keepdim=True)).exp()

    def _check_metric(self, input: Tensor, metric: Tensor | None) -> None:
        if self.mode in ("summation", "average"):
            if metric is not None:
                raise ValueError(f'metric must be None in mode "{self.mode}", which does not use it')
            return
        if metric is None:
            raise ValueError(f'metric is None; mode "{self.mode}" needs one weight for each pixel')
        check_floating("metric", metric)
        check_alike("metric", metric, "input", input, dtype=False)
        expected = [input.shape[0], 1, *input.shape[2:]]
        if list(metric.shape) != expected:
            raise ValueError(
                f"metric has shape {list(metric.shape)}; with input of shape {list(input.shape)} it must be {expected}"
            )
