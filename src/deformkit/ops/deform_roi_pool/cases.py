"""Named inputs of deformable RoI pooling for tests, benchmarks and documentation."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .._case import BaseCase, Draw, check_shape
from .._shape import ntuple, times

OPERATOR = "deform_roi_pool"


@dataclass(frozen=True)
class Case(BaseCase):
    """The sizes of one call; :meth:`arguments` creates its tensors.

    ``bin_size`` is the length of the longest bin, in pixels of the input. ``spread`` limits how far RoIs stick out, in
    multiples of their length: 0 not at all, 0.5 by half; above 1 they may lie completely outside. ``channels`` is their
    number in the output.
    """

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    rois: int
    output_size: tuple[int, ...]
    spatial_scale: float = 1.0
    sampling_ratio: int = 2
    gamma: float = 0.1
    with_offset: bool = True
    bin_size: float = 2.0
    spread: float = 0.25
    group_size: tuple[int, ...] = ()

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU.

        Each sample is at a multiple of 1/16 of a pixel plus 1/32, because sizes of bins, starts of RoIs and shifts by
        offsets are chosen so.
        """
        length = self._lengths(draw)
        size = torch.tensor(self.size, dtype=torch.float64)
        start = draw.uniform(self.rois, self.axes) * (size - length * (1 - 2 * self.spread)) - self.spread * length
        low = ((start * 8).floor() / 8 + 1 / 32 + 0.5) / self.spatial_scale
        high = low + length / self.spatial_scale
        index = torch.randint(self.batch, (self.rois, 1), generator=draw.generator)
        offset = self._offset(draw, length) if self.with_offset else None
        return {
            "input": draw.normal(self.batch, self.channels * prod(self.group_size), *self.size),
            # Lengths and starts are in the order of the axes; corners and offsets are x first.
            "rois": torch.cat([index, low.flip(1), high.flip(1)], 1),
            "offset": offset,
            "output_size": list(self.output_size),
            "spatial_scale": self.spatial_scale,
            "sampling_ratio": self.sampling_ratio,
            "gamma": self.gamma,
            "group_size": list(self.group_size),
        }

    def _lengths(self, draw: Draw) -> torch.Tensor:
        """``[R, N]``: the lengths of the RoIs, in pixels of the input."""
        if self.sampling_ratio:
            samples = torch.full((self.rois, self.axes), float(self.sampling_ratio), dtype=torch.float64)
            least, most = torch.ones_like(samples), (8 * self.bin_size / samples).floor().clamp(1)
        else:  # bins longer than n - 1 and shorter than n pixels, which exist for n up to 7
            samples = 1 + (draw.uniform(self.rois, self.axes) * min(self.bin_size, 7)).floor()
            least, most = (8 * (samples - 1) / samples).floor() + 1, torch.full_like(samples, 7.0)
        step = least + (draw.uniform(self.rois, self.axes) * (most - least + 1)).floor()
        return torch.tensor(self.output_size, dtype=torch.float64) * samples * step / 8

    def _offset(self, draw: Draw, length: torch.Tensor) -> torch.Tensor:
        reach = self.gamma * length.flip(1).reshape(self.rois, self.axes, *[1] * self.axes)
        return (draw.normal(self.rois, self.axes, *self.output_size) * reach * 16).round() / 16 / reach

    def __str__(self) -> str:
        samples = f"{self.sampling_ratio} samples" if self.sampling_ratio else "adaptive"
        sizes = f"B{self.batch} C{self.channels} {times(self.size)}, {self.rois} RoIs -> {times(self.output_size)}"
        return f"{self.name} ({sizes}, {samples})"


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the input ``[B, C, *S]``. By default there are 100 RoIs with 7 bins along each axis."""
    check_shape(shape, "[B, C, *S]", 2)
    batch, channels, *size = shape
    settings = {"rois": 100, "output_size": 7, **settings}
    for name in ("output_size", "group_size"):
        if name in settings:
            settings[name] = tuple(ntuple(settings[name], len(size), name, 1))
    groups = prod(settings.get("group_size", ()))
    if channels % groups:
        raise ValueError(
            f"group_size is {settings['group_size']}; channels, which is {channels}, must be a multiple of {groups}"
        )
    return Case(times(shape), batch, channels // groups, tuple(size), **settings)


CASES = [
    Case("1d", 2, 3, (11,), 5, (3,)),
    Case("1d-adaptive", 2, 4, (17,), 6, (4,), 0.5, sampling_ratio=0, gamma=0.3, bin_size=3.0, spread=0.5),
    Case("1d-plain", 4, 5, (9,), 3, (2,), sampling_ratio=3, with_offset=False, spread=0.75),
    Case("1d-outside", 1, 1, (6,), 7, (1,), 2.0, sampling_ratio=1, spread=1.5),
    Case("1d-wide", 1, 32, (40,), 3, (5,), gamma=1.0, bin_size=5.0),
    Case("2d", 2, 3, (7, 9), 4, (2, 3)),
    Case("2d-adaptive", 3, 2, (12, 10), 5, (3, 2), 0.25, sampling_ratio=0, bin_size=3.0, spread=0.5),
    Case("2d-adaptive-plain", 1, 7, (9, 8), 4, (2, 2), sampling_ratio=0, with_offset=False, spread=0.75),
    Case("2d-plain", 4, 16, (8, 7), 3, (3, 3), 1 / 16, sampling_ratio=1, with_offset=False),
    Case("2d-outside", 2, 1, (5, 6), 9, (2, 1), sampling_ratio=3, gamma=0.5, spread=1.5),
    Case("2d-wide", 1, 40, (12, 14), 3, (3, 4), gamma=0.2),
    Case("1d-groups", 2, 3, (11,), 5, (5,), 0.5, spread=0.5, group_size=(2,)),
    Case("2d-groups", 2, 2, (7, 9), 5, (3, 4), sampling_ratio=3, spread=0.5, group_size=(3, 2)),
    Case("2d-groups-adaptive", 3, 1, (8, 6), 6, (2, 3), 0.25, 0, gamma=0.5, spread=1.0, group_size=(2, 3)),
    Case("2d-one-group", 1, 17, (9, 8), 4, (2, 2), sampling_ratio=1, with_offset=False, spread=1.5, group_size=(1, 1)),
    Case("2d-row", 2, 3, (1, 9), 4, (1, 5), sampling_ratio=1, bin_size=1.0),
    Case("3d", 2, 3, (4, 5, 6), 3, (2, 1, 2)),
    Case("3d-adaptive", 2, 2, (6, 5, 7), 4, (1, 2, 3), 0.5, sampling_ratio=0, spread=0.5),
    Case("3d-groups", 1, 2, (4, 5, 6), 3, (2, 1, 2), spread=0.5, group_size=(2, 1, 3)),
    Case("3d-plain", 1, 17, (5, 4, 6), 2, (2, 2, 1), sampling_ratio=1, with_offset=False, spread=0.75),
]

BENCHMARKS = [
    Case("2d 500 RoIs", 2, 256, (100, 167), 500, (7, 7), 1 / 8, bin_size=6.0),
    Case("2d 100 RoIs adaptive", 1, 256, (100, 167), 100, (7, 7), 1 / 8, sampling_ratio=0, bin_size=3.0),
    Case("1d 200 segments", 4, 256, (2048,), 200, (16,), 1 / 4, bin_size=12.0),
    Case("2d 300 RoIs of 49 groups", 1, 24, (38, 63), 300, (7, 7), 1 / 16, 4, bin_size=3.0, group_size=(7, 7)),
    Case("3d 50 cuboids", 1, 64, (16, 50, 84), 50, (3, 7, 7), 1 / 4, bin_size=3.0),
]
