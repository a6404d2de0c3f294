"""Named inputs of deformable sampling for tests, benchmarks and documentation."""

from dataclasses import dataclass
from typing import Any

from .._case import BaseCase, Draw, check_divisor, check_shape, off_grid
from .._shape import ntuple, times

OPERATOR = "deform_sample"


@dataclass(frozen=True)
class Case(BaseCase):
    """The sizes of one call; :meth:`arguments` creates its tensors.

    ``out_size`` gives the number of points, ``spread`` their distance from a regular grid over the field, in pixels;
    with None they lie anywhere.
    """

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    out_size: tuple[int, ...]
    groups: int = 1
    boundary: str = "zeros"
    mode: str = "linear"
    spread: float | None = None

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        points = draw.points((self.batch, self.groups), self.out_size, self.size, self.spread)
        return {
            "input": draw.normal(self.batch, self.channels, *self.size),
            "points": off_grid(points, lines=2 if self.mode == "nearest" else 1),
            "boundary": self.boundary,
            "mode": self.mode,
        }

    def __str__(self) -> str:
        groups = f" G{self.groups}" if self.groups > 1 else ""
        nearest = ", nearest" if self.mode == "nearest" else ""
        where = "anywhere" if self.spread is None else "in order"
        points = f"{times(self.out_size)} points {where}"
        return f"{self.name} (B{self.batch} C{self.channels}{groups} {times(self.size)}, {points}{nearest})"


FROM_SHAPE = ("name", "batch", "channels", "size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the input ``[B, C, *S]``; by default it has as many points as positions, moved by about a pixel."""
    check_shape(shape, "[B, C, *S]", 2)
    batch, channels, *size = shape
    settings = {"spread": 1.0, **settings}
    out_size = ntuple(settings.pop("out_size", size), len(size), "out_size", 1)
    check_divisor(settings, "groups", channels=channels)
    return Case(times(shape), batch, channels, tuple(size), tuple(out_size), **settings)


CASES = [
    Case("1d", 2, 3, (11,), (17,)),
    Case("1d-groups", 3, 6, (9,), (4,), groups=3, boundary="border"),
    Case("1d-one-channel", 1, 1, (40,), (64,), spread=1.5),
    Case("1d-reflect", 2, 9, (5,), (33,), boundary="reflect", spread=6.0),
    Case("1d-nearest", 2, 2, (7,), (5,), mode="nearest"),
    Case("2d", 2, 3, (5, 6), (4, 7)),
    Case("2d-groups", 2, 12, (6, 5), (3, 3), groups=4, spread=1.0),
    Case("2d-wide", 1, 40, (9, 8), (6, 5), spread=1.0),
    Case("2d-border", 3, 16, (4, 9), (2, 5), boundary="border"),
    Case("2d-reflect", 1, 8, (3, 4), (40,) * 2, boundary="reflect", spread=5.0),
    Case("2d-nearest", 2, 17, (8, 7), (5, 6), groups=1, boundary="reflect", mode="nearest", spread=3.0),
    Case("2d-row", 1, 2, (1, 9), (1, 30), groups=2, boundary="border", mode="nearest"),
    Case("3d", 2, 3, (4, 3, 5), (3, 4, 5)),
    Case("3d-wide", 1, 24, (5, 4, 6), (2, 3, 4), groups=2, boundary="border"),
    Case("3d-reflect", 2, 1, (3, 4, 2), (6, 5, 4), boundary="reflect", spread=4.0),
    Case("3d-nearest", 1, 5, (4, 4, 3), (7, 1, 2), mode="nearest"),
]

BENCHMARKS = [
    Case("2d 64x256x256", 1, 64, (256, 256), (256, 256), spread=1.0),
    Case("2d 64x256x256 anywhere", 1, 64, (256, 256), (256, 256)),
    Case("2d 8 images 64x64x64", 8, 64, (64, 64), (64, 64), spread=1.0),
    Case("2d 8 images 3x224x224", 8, 3, (224, 224), (224, 224), spread=1.0),
    Case("3d 8 volumes 1x32x64x64", 8, 1, (32, 64, 64), (32, 64, 64), spread=1.0),
    Case("1d 64x4096", 4, 64, (4096,), (4096,), spread=1.0),
    Case("3d one channel 160x192x160", 1, 1, (160, 192, 160), (160, 192, 160), spread=1.0),
    Case("3d 16x64x64x64", 1, 16, (64, 64, 64), (64, 64, 64), spread=1.0),
    Case("3d 16x64x64x64 anywhere", 1, 16, (64, 64, 64), (64, 64, 64)),
]
