"""Every operator in every number of dimensions as a module whose batch and sizes may change after it was exported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

Draw = Callable[[int, int], tuple[Tensor, ...]]


class Applied(nn.Module):
    """A function of tensors as a module, with the parameters that it takes first."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(parameters)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*self.weights, *values)


@dataclass(frozen=True)
class Resized:
    """An operator with ``axes`` spatial axes."""

    name: str
    axes: int
    module: nn.Module
    draw: Draw
    """Arguments for a batch size and a spatial size."""

    def __str__(self) -> str:
        return f"{self.name}-{self.axes}d"

    def dynamic_shapes(self, kind: Any = torch.export.Dim.AUTO) -> Any:
        """What may change, as dimensions of this kind: all sizes that differ between two drawn arguments."""
        found = []
        for small, large in zip(self.draw(2, 6), self.draw(3, 9), strict=True):
            found.append({i: kind for i, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b})
        return (tuple(found),)


def resized(axes: int) -> list[Resized]:
    """Every operator with this number of spatial axes."""
    n, taps = axes, 3**axes
    generator = torch.Generator().manual_seed(axes)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def spatial(size: int) -> tuple[int, ...]:
        return (size, size - 1, size - 2)[:n]

    def inside(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 1.4 - 0.2

    def pixels(size: int, *shape: int) -> Tensor:
        return inside(*shape, n) * torch.tensor([float(s) for s in spatial(size)])

    conv = getattr(ops, f"deform_conv{n}d")
    transpose = getattr(ops, f"deform_conv_transpose{n}d")

    def convolved(weight: Tensor, bias: Tensor, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return conv(input, offset, weight, bias, padding=1, mask=mask)

    def transposed(weight: Tensor, bias: Tensor, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return transpose(input, offset, weight, bias, stride=2, padding=1, output_padding=1, groups=2, mask=mask)

    def field(b: int, s: int) -> tuple[Tensor, ...]:
        size = spatial(s)
        return normal(b, 4, *size), normal(b, 2 * taps * n, *size), inside(b, 2 * taps, *size)

    def aggregated(value: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return ops.deform_aggregate(value, offset, weight, 3, padding=1)

    def heads(b: int, s: int) -> tuple[Tensor, ...]:
        size = spatial(s)
        return normal(b, *size, 2, 3), normal(b, *size, 2, taps, n), normal(b, *size, 2, taps, scale=0.3)

    def levels(fine: Tensor, coarse: Tensor) -> tuple[Tensor, list[Any]]:
        value = torch.cat([fine.flatten(1, n), coarse.flatten(1, n)], 1).unflatten(2, (2, 3))
        return value, [tuple(fine.shape[1 : n + 1]), tuple(coarse.shape[1 : n + 1])]

    def attended(fine: Tensor, coarse: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ops.ms_deform_attn(*levels(fine, coarse), locations, weights)

    def correlated(fine: Tensor, coarse: Tensor, locations: Tensor, query: Tensor) -> Tensor:
        return ops.deform_correlate(query, *levels(fine, coarse), locations)

    def maps(b: int, s: int) -> tuple[Tensor, ...]:
        return normal(b, *spatial(s), 6), normal(b, *spatial(s + 1), 6), inside(b, s, 2, 2, 2, n)

    def splatted(input: Tensor, points: Tensor, onto: Tensor) -> Tensor:
        return onto + ops.deform_splat(input, points, list(onto.shape[2:]))

    def pooled(input: Tensor, rois: Tensor) -> Tensor:
        return ops.deform_roi_pool(input, rois, output_size=(2,) * n, sampling_ratio=2)

    def regions(b: int, s: int) -> tuple[Tensor, ...]:
        starts = torch.rand(s, n, generator=generator) * 2
        extents = torch.rand(s, n, generator=generator) * 3 + 1
        index = torch.arange(s).remainder(b).float()[:, None]
        return normal(b, 4, *spatial(s)), torch.cat([index, starts, starts + extents], 1)

    kernel = (3,) * n
    return [
        Resized("deform_conv", n, Applied(convolved, normal(6, 2, *kernel, scale=0.3), normal(6)), field),
        Resized("deform_conv_transpose", n, Applied(transposed, normal(4, 3, *kernel, scale=0.3), normal(6)), field),
        Resized("deform_aggregate", n, Applied(aggregated), heads),
        Resized("ms_deform_attn", n, Applied(attended), lambda b, s: (*maps(b, s), normal(b, s, 2, 2, 2))),
        Resized("deform_correlate", n, Applied(correlated), lambda b, s: (*maps(b, s), normal(b, s, 2, 3))),
        Resized(
            "deform_sample",
            n,
            Applied(ops.deform_sample),
            lambda b, s: (normal(b, 4, *spatial(s)), pixels(s, b, 2, s + 1)),
        ),
        Resized(
            "deform_splat",
            n,
            Applied(splatted),
            lambda b, s: (normal(b, 4, s + 1), pixels(s, b, 2, s + 1), normal(b, 4, *spatial(s))),
        ),
        Resized("deform_roi_pool", n, Applied(pooled), regions),
    ]
