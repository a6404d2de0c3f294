"""The base of the single-scale layers of both releases, which differ in their queries and in the layout of the head."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...nn._linear import linear
from ...nn.dcn import _DCN
from ...ops._shape import check_choice, check_count, check_tensor, ntuple, prod, times

Project = type[nn.Module]


class ScaleLinear(nn.Module):
    """Computes a factor between 0 and 1 for each group: ``sigmoid(linear(query))``.

    Args:
        dim: C, channels of the query.
        groups: number of factors.

    Shapes: ``[..., C]``, output ``[..., groups]``.

    Example:
        >>> import torch
        >>> ScaleLinear(8, 2)(torch.randn(5, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.scale_weight = nn.Parameter(torch.zeros(groups, dim))
        self.scale_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, query: Tensor) -> Tensor:
        """Compute the factors."""
        return nn.functional.linear(query, self.scale_weight, self.scale_bias).sigmoid()


class Sampling(_DCN):
    """Deformable aggregation between two projections, then a norm and an activation.

    A subclass makes ``proj_output``, ``center_scale``, ``norm`` and ``activation``, in the order of its release.

    The heads of deformops have taps in column-major order and offsets as (x, y). Here they are converted to
    the order of :func:`deformkit.deform_aggregate`.
    """

    proj_output: nn.Module | None
    center_scale: ScaleLinear | None
    norm: nn.Module | None
    activation: nn.Module | None

    def __init__(
        self,
        dim_name: str,
        dim: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int] | Literal["same"],
        dilation: int | Sequence[int],
        groups: int,
        offset_scale: float,
        centre_scaled: bool,
        centre_removed: bool,
        softmax: bool,
    ) -> None:
        for name, count in ((dim_name, dim), ("groups", groups)):
            check_count(name, count)
        if dim % groups:
            raise ValueError(f"{dim_name} is {dim}; it must be divisible by groups, which is {groups}")
        kernel, dilations = ntuple(kernel_size, 2, "kernel_size", 1), ntuple(dilation, 2, "dilation", 1)
        if isinstance(padding, str):
            check_choice("padding", padding, ("same",), " or numbers")
            padding = [d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)]
        window = (kernel, stride, padding, dilations)
        super().__init__(dim, *window, groups, offset_scale, None, centre_scaled, centre_removed, 2)
        self.softmax = softmax

    def _head_size(self) -> int:
        """The number of rows of the head: three for each tap of each group, and unused ones up to a multiple of 8."""
        return -(-self.group * self._taps * 3 // 8) * 8

    def _split(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Join offsets (x, y) ``[..., G, K, 2]`` and masks ``[..., G, K]`` as a head has them, ``[..., G, 3*K]``."""
        raise NotImplementedError

    def _points(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets ``[N, *out, G, K, 2]`` and masks ``[N, *out, G, K]`` of the operator, from the output of a head."""
        used = head[..., : self.group * self._taps * 3].unflatten(-1, (self.group, -1))
        offset, mask = self._split(used)
        offset, mask = self._row_after_row(offset, -2).flip(-1), self._row_after_row(mask, -1)
        return offset, mask.softmax(-1) if self.softmax else mask

    def _row_after_row(self, taps: Tensor, dim: int) -> Tensor:
        """Convert taps along ``dim`` from column-major to row-major order."""
        half = self._taps // 2
        if self.remove_center:
            # Any tap can stand for the middle one in the meantime.
            taps = torch.cat([taps.narrow(dim, 0, half + 1), taps.narrow(dim, half, half)], dim)
        taps = taps.unflatten(dim, self.kernel_size[::-1]).transpose(dim - 1, dim).flatten(dim - 1, dim)
        if self.remove_center:
            taps = torch.cat([taps.narrow(dim, 0, half), taps.narrow(dim, half + 1, half)], dim)
        return taps

    def _sample(self, value: Tensor, head: Tensor, flat: bool) -> Tensor:
        """The output, in the layout of the input, for a projected value ``[N, H, W, C]`` and the output of a head."""
        aggregated = self._aggregate(value, *self._points(head))
        if self.center_scale is not None:
            share = self.center_scale(aggregated).repeat_interleave(self.channels // self.group, -1)
            aggregated = aggregated * (1 - share) + self._at_centres(value) * share
        output = project(self.proj_output, aggregated)
        output = output.flatten(1, 2) if flat else output.movedim(-1, 1).contiguous()
        for module in (self.norm, self.activation):
            output = output if module is None else module(output)
        return output

    def _channels_last(self, name: str, value: Tensor, shape: Sequence[int] | None, where: str) -> Tensor:
        """A tensor ``[N, C, H, W]``, or tokens ``[N, L, C]`` with their ``shape``, as ``[N, H, W, C]``."""
        check_tensor(name, value)
        size = None if shape is None else ntuple(shape, 2, "shape", 1)
        if value.dim() not in (3, 4):
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be [N, C, H, W] or [N, L, C]")
        channels = value.shape[1 if value.dim() == 4 else 2]
        if channels != self.channels:
            raise ValueError(f"{name} has {channels} channels; this layer has {self.channels}")
        if value.dim() == 4:
            if size is not None and size != list(value.shape[2:]):
                raise ValueError(f"{name} has spatial size {times(value.shape[2:])}; {where} {times(size)}")
            return value.movedim(1, -1)
        if size is None:
            raise ValueError(f"shape is None; {name} of shape {list(value.shape)} needs the sizes of its spatial axes")
        if value.shape[1] != prod(size):
            raise ValueError(f"{name} has {value.shape[1]} positions; {where} {times(size)}")
        return value.unflatten(1, size)


def project(module: nn.Module | None, value: Tensor) -> Tensor:
    """Apply ``module``, which takes tokens ``[N, H*W, C]``, to ``value [N, H, W, C]``."""
    return value if module is None else linear(module, value.flatten(1, 2)).unflatten(1, value.shape[1:3])


def reset_projections(*modules: nn.Module | None) -> None:
    """Reset the parameters with the method of the module, or else like a layer of attention: Xavier, and zero bias."""
    for module in modules:
        reset = getattr(module, "reset_parameters", None)
        if module is None:
            continue
        if callable(reset):
            reset()
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight":
                nn.init.xavier_uniform_(parameter)
            elif name == "bias":
                nn.init.zeros_(parameter)
