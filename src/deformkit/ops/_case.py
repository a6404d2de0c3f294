"""What the named inputs of all operators share: a case has the sizes of a call, and draws its arguments."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._shape import checked_output_size, compute_dtype, ntuple, times

# Positions in a field, which half precision would move by pixels. An offset is small, and has the dtype of the values.
POSITIONS = ("points", "rois", "sampling_locations")


class Draw:
    """Random numbers of one seed, in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Numbers of the standard normal distribution."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def points(
        self, leading: tuple[int, ...], counts: Sequence[int], size: Sequence[int], spread: float | None
    ) -> Tensor:
        """Points ``[*leading, *counts, N]`` in pixels of a field of ``size``.

        They lie on a regular grid over the field, moved by random distances of ``spread`` pixels. With a ``spread`` of
        None they lie anywhere in the field and up to two pixels outside.
        """
        shape = (*leading, *counts, len(size))
        if spread is None:
            return self.uniform(*shape) * (torch.tensor(size, dtype=torch.float64) + 4) - 2.5
        along = [(torch.arange(n) + 0.5) / n * s - 0.5 for n, s in zip(counts, size, strict=True)]
        return torch.stack(torch.meshgrid(*along, indexing="ij"), -1).double() + self.normal(*shape) * spread


def off_grid(point: Tensor, lines: int = 1) -> Tensor:
    """``point``, moved within its cell so far from grid lines that rounding does not change the cell.

    Args:
        point: in pixels.
        lines: how many grid lines there are for each pixel. Half-way between two pixels the nearest one changes.
    """
    low = (point * lines).floor()
    return (low + (point * lines - low).clamp(0.05, 0.95)) / lines


class BaseCase(ABC):
    """The sizes of one call. The class of a room is a dataclass with ``name``, ``batch`` and the other sizes."""

    size: tuple[int, ...]

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Random arguments by name, in the order of the operator's schema. No point is near a grid line."""
        return {
            name: value.to(device, compute_dtype(dtype) if name in POSITIONS else dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in self.drawn(Draw(seed)).items()
        }

    @abstractmethod
    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""

    def per_axis(self, *names: str) -> list[list[int]]:
        """The values of fields that are one number for all axes or one for each."""
        return [ntuple(getattr(self, name), self.axes, name, 0) for name in names]


@dataclass(frozen=True)
class ConvolutionCase(BaseCase):
    """What the convolution and its adjoint share. ``grid`` is the size over which the kernel moves."""

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    boundary: str = "zeros"
    offset_std: float = 2.0

    @property
    def taps(self) -> int:
        """Number of taps of the kernel."""
        return prod(self.kernel_size)

    def offset(self, draw: Draw, grid: Sequence[int]) -> Tensor:
        """Offsets of ``offset_std`` pixels."""
        return off_grid(draw.normal(self.batch, self.offset_groups * self.taps * self.axes, *grid) * self.offset_std)

    def weight(self, draw: Draw, *channels: int) -> Tensor:
        """A weight whose products have a variance of one."""
        return draw.normal(*channels, *self.kernel_size) / (self.channels // self.groups * self.taps) ** 0.5

    def mask(self, draw: Draw, grid: Sequence[int]) -> Tensor | None:
        """A mask between 0 and 1, or None for a convolution without."""
        return draw.normal(self.batch, self.offset_groups * self.taps, *grid).sigmoid() if self.modulated else None

    def __str__(self) -> str:
        sizes = f"B{self.batch} C{self.channels} {times(self.size)} -> {self.out_channels}, k{times(self.kernel_size)}"
        return f"{self.name} ({sizes})"


@dataclass(frozen=True)
class LevelsCase(BaseCase):
    """What attention and correlation share. Points lie up to ``reach`` pixels beyond the edge of a level."""

    name: str
    batch: int
    sizes: tuple[tuple[int, ...], ...]
    queries: int
    heads: int
    channels: int
    points: tuple[int, ...]
    mode: str = "linear"
    reach: float = 1.5

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.sizes[0])

    @property
    def positions(self) -> int:
        """Number of positions of all levels."""
        return sum(map(prod, self.sizes))

    @property
    def spatial_shapes(self) -> list[int]:
        """The sizes of the levels, one after the other."""
        return [length for size in self.sizes for length in size]

    def locations(self, draw: Draw) -> Tensor:
        """``[B, Q, H, P, N]`` from 0 to 1 over each level, x first."""
        levels = []
        for size, count in zip(self.sizes, self.points, strict=True):
            extent = torch.tensor(size, dtype=torch.float64)
            pixel = off_grid(self.pixels(draw, count, extent))
            levels.append(((pixel + 0.5) / extent).flip(-1))
        return torch.cat(levels, 3)

    def pixels(self, draw: Draw, count: int, extent: Tensor) -> Tensor:
        """``count`` points for each query and head in pixels of a level of the size ``extent``, anywhere."""
        unit = draw.uniform(self.batch, self.queries, self.heads, count, self.axes)
        return unit * (extent + 2 * self.reach) - self.reach - 0.5

    def __str__(self) -> str:
        levels = " ".join(times(size) for size in self.sizes)
        points = "+".join(map(str, self.points))
        return f"{self.name} (B{self.batch} {levels}, Q{self.queries} H{self.heads} D{self.channels} P{points})"


def check_shape(shape: Sequence[int], layout: str, others: int | None = None) -> None:
    """Raise a ValueError unless ``shape`` is of ``layout``, which has 1 to 3 spatial axes S besides ``others``."""
    if others is None:
        fits, which = len(shape) == layout.count(",") + 1, ""
    else:
        fits, which = 1 <= len(shape) - others <= 3, " with 1, 2 or 3 spatial axes S"
    if not fits or min(shape) < 1:
        raise ValueError(f"shape is {list(shape)}; it must be {layout}{which}, and no axis may be empty")


def check_divisor(settings: dict[str, Any], divisor: str, **counts: int) -> None:
    """Raise a ValueError unless the setting ``divisor``, 1 by default, divides each of ``counts``."""
    value = settings.get(divisor, 1)
    for name, count in counts.items():
        if type(value) is not int or value < 1 or count % value:
            raise ValueError(f"{divisor} is {value!r}; it must divide {name}, which is {count}")


def windowed(settings: dict[str, Any], name: str, size: Sequence[int]) -> dict[str, Any]:
    """``settings`` with a ``kernel_size`` of 3 and the ``padding`` that keeps ``size``, unless they are set.

    Raises:
        ValueError: the argument ``name`` of this size has no output.
    """
    defaults = {"kernel_size": 3, "stride": 1, "dilation": 1}
    kernel, stride, dilation = (ntuple(settings.get(n, value), len(size), n, 1) for n, value in defaults.items())
    same = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    padding = ntuple(settings.get("padding", same), len(size), "padding", 0)
    checked_output_size(name, size, kernel, stride, padding, dilation)
    return {**settings, "kernel_size": tuple(kernel), "padding": tuple(padding)}


def levelled(settings: dict[str, Any], length: int | None = None) -> dict[str, Any]:
    """``settings`` with a number of ``points`` for each of the levels ``sizes``, which have ``length`` positions."""
    sizes = settings.get("sizes")
    axes = {len(size) for size in sizes} if sizes else set()
    if not sizes or len(axes) > 1 or not axes <= {1, 2, 3} or min(map(min, sizes)) < 1:
        raise ValueError(f"sizes is {sizes!r}; it must be set to the sizes of the levels, all of 1, 2 or 3 axes")
    if length not in (None, sum(map(prod, sizes))):
        raise ValueError(f"sizes is {sizes!r}; the sizes of the levels must add up to S = {length}")
    points = ntuple(settings["points"], len(sizes), "points", 0)
    return {**settings, "sizes": tuple(map(tuple, sizes)), "points": tuple(points)}
