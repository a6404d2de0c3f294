"""Named inputs of splatting for tests, benchmarks and documentation."""

from dataclasses import dataclass
from typing import Any

from .._case import BaseCase, Draw, check_divisor, check_shape, off_grid
from .._shape import ntuple, times

OPERATOR = "deform_splat"


@dataclass(frozen=True)
class Case(BaseCase):
    """The sizes of one call; :meth:`arguments` creates its tensors.

    ``spread`` is the distance of the values from a regular grid over the result, in pixels; with None they lie
    anywhere.
    """

    name: str
    batch: int
    channels: int
    in_size: tuple[int, ...]
    size: tuple[int, ...]
    groups: int = 1
    boundary: str = "zeros"
    spread: float | None = None

    def drawn(self, draw: Draw) -> dict[str, Any]:
        """The arguments with tensors in float64 on the CPU."""
        points = draw.points((self.batch, self.groups), self.in_size, self.size, self.spread)
        return {
            "input": draw.normal(self.batch, self.channels, *self.in_size),
            "points": off_grid(points),
            "size": list(self.size),
            "boundary": self.boundary,
        }

    def __str__(self) -> str:
        groups = f" G{self.groups}" if self.groups > 1 else ""
        where = "anywhere" if self.spread is None else "in order"
        sizes = f"{times(self.in_size)} {where} to {times(self.size)}"
        return f"{self.name} (B{self.batch} C{self.channels}{groups} {sizes})"


FROM_SHAPE = ("name", "batch", "channels", "in_size")


def of_shape(shape: list[int], **settings: Any) -> Case:
    """A case with the input ``[B, C, *S]``; by default the result has the same size, and points move by a pixel."""
    check_shape(shape, "[B, C, *S]", 2)
    batch, channels, *in_size = shape
    settings = {"spread": 1.0, **settings}
    size = ntuple(settings.pop("size", in_size), len(in_size), "size", 1)
    check_divisor(settings, "groups", channels=channels)
    return Case(times(shape), batch, channels, tuple(in_size), tuple(size), **settings)


CASES = [
    Case("1d", 2, 3, (17,), (11,)),
    Case("1d-groups", 3, 6, (4,), (9,), groups=3, boundary="border"),
    Case("1d-reflect", 1, 9, (33,), (5,), boundary="reflect", spread=6.0),
    Case("2d", 2, 3, (4, 7), (5, 6)),
    Case("2d-groups", 1, 12, (3, 3), (6, 5), groups=4, spread=1.0),
    Case("2d-border", 3, 16, (2, 5), (4, 9), boundary="border"),
    Case("2d-reflect", 1, 2, (9, 7), (3, 4), boundary="reflect", spread=5.0),
    Case("3d", 2, 3, (3, 4, 5), (4, 3, 5)),
    Case("3d-reflect", 1, 2, (5, 4, 2), (3, 4, 2), groups=2, boundary="reflect", spread=4.0),
]

BENCHMARKS = [
    Case("2d 64x256x256", 1, 64, (256, 256), (256, 256), spread=1.0),
    Case("2d 64x256x256 anywhere", 1, 64, (256, 256), (256, 256)),
    Case("1d 64x4096", 4, 64, (4096,), (4096,), spread=1.0),
    Case("3d 16x64x64x64", 1, 16, (64, 64, 64), (64, 64, 64), spread=1.0),
]
