"""The figures of the documentation, drawn from what the layers and operators really sample."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import deformkit as dk

BLUE, ORANGE, GREY, DARK = "#0072b2", "#d55e00", "#9a9a9a", "#222222"
# One colour for a group, head or level.
PARTS = (BLUE, ORANGE)


def draw(output_folder: Path) -> None:
    """Write every figure as SVG into ``output_folder``."""
    output_folder.mkdir(parents=True, exist_ok=True)
    # The same file from every build.
    with matplotlib.rc_context({"svg.hashsalt": "deformkit", "font.size": 10}):
        for name, figure in FIGURES.items():
            figure().savefig(output_folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def _conventions_taps() -> Figure:
    figure = Figure(figsize=(4.4, 4.4), layout="constrained")
    axes = figure.subplots()
    _pixels(axes, 5, 5)
    axes.set_title("The taps of a 3x3 kernel, and an offset", fontsize=10)
    plain = _taps(torch.zeros(1, 18, 5, 5), (2, 2))
    _numbered(axes, plain)
    offset = torch.zeros(1, 18, 5, 5)
    # Tap 8: channel 16 is h, channel 17 is w.
    offset[0, 16:18, 2, 2] = torch.tensor([0.5, 0.9])
    moved = _taps(offset, (2, 2))
    _arrow(axes, plain[8], moved[8])
    axes.plot(moved[8, 1], moved[8, 0], "o", markerfacecolor="none", color=ORANGE, markersize=9)
    text = "tap 8, offset\n(h, w) = (0.5, 0.9)\n(x, y) = (0.9, 0.5)"
    axes.annotate(text, (3.4, 3.5), ha="right", va="top", fontsize=10, color=ORANGE)
    axes.set_xlabel("w  (x in grid_sample and detectors)")
    axes.set_ylabel("h  (y in grid_sample and detectors)")
    return figure


def _conventions_pixels() -> Figure:
    figure = Figure(figsize=(4.4, 4.4), layout="constrained")
    axes = figure.subplots()
    _pixels(axes, 2, 3)
    axes.set_title("Pixels (h, w) and locations (x, y)", fontsize=10, pad=14)
    for row in range(2):
        for column in range(3):
            axes.plot(column, row, "o", color=BLUE, markersize=6)
            text = f"({row}, {column})"
            axes.annotate(text, (column, row), (0, -14), textcoords="offset points", ha="center", fontsize=9)
    axes.plot([-0.5, 2.5], [-0.5, 1.5], "s", color=ORANGE, markersize=7, clip_on=False)
    notes = {
        "pixel (0, 0): the centre\nof the first pixel": ((0, 0), (0.5, -1.15), BLUE),
        "location (0, 0):\nthe outer edge": ((-0.5, -0.5), (-1.15, -1.15), ORANGE),
        "location (1, 1)": ((2.5, 1.5), (1.5, 2.1), ORANGE),
    }
    for text, (point, place, colour) in notes.items():
        line = {"arrowstyle": "-", "color": colour, "shrinkB": 4}
        axes.annotate(text, point, place, color=colour, fontsize=9, arrowprops=line)
    axes.set_xlim(-1.2, 2.9)
    axes.set_ylim(2.3, -1.4)
    axes.set_xlabel("w")
    axes.set_ylabel("h")
    return figure


def _convolution() -> Figure:
    torch.manual_seed(1)
    figure, axes = _square("Deformable convolution: one output position, 3x3 kernel")
    offset = torch.zeros(1, 18, 7, 7)
    offset[0, :, 3, 3] = torch.randn(18) * 0.7
    plain, moved = _taps(torch.zeros_like(offset), (3, 3)), _taps(offset, (3, 3))
    axes.plot(plain[:, 1], plain[:, 0], "o", markerfacecolor="none", color=GREY, label="plain convolution")
    for start, end in zip(plain, moved, strict=True):
        _arrow(axes, start, end)
    axes.plot(moved[:, 1], moved[:, 0], "o", color=BLUE, label="deformable")
    return _with_legend(figure)


def _aggregation() -> Figure:
    torch.manual_seed(3)
    figure, axes = _square("Deformable aggregation: two heads, a weight for each sample")
    layer = dk.nn.DCNv4(32, group=2)
    with torch.no_grad():
        layer.offset_mask.bias.normal_(0, 0.8)
    offset, weight = layer.predict(torch.zeros(1, 7, 7, 32))
    points = layer.sampling_locations(offset)[0, 3, 3].detach()
    for head, colour in enumerate(PARTS):
        sizes = 15 + 90 * weight[0, 3, 3, head].abs().detach()
        axes.scatter(points[head, :, 1], points[head, :, 0], sizes, color=colour, label=f"head {head}", zorder=3)
    axes.plot(3, 3, "+", color=DARK, markersize=12, label="output position")
    return _with_legend(figure)


def _attention() -> Figure:
    torch.manual_seed(0)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    reference = torch.tensor([0.6, 0.45])
    locations = reference + 0.13 * torch.randn(2, 4, 2)
    for level, (axes, (rows, columns)) in enumerate(zip(figure.subplots(1, 2), [(8, 8), (4, 4)], strict=True)):
        _pixels(axes, rows, columns)
        size = torch.tensor([columns, rows])
        points, centre = locations[level] * size - 0.5, reference * size - 0.5
        axes.plot(points[:, 0], points[:, 1], "o", color=PARTS[level], label=f"points on level {level}")
        axes.plot(*centre, "+", color=DARK, markersize=12)
        axes.set_title(f"level {level}: {rows} x {columns}")
    axes.plot([], [], "+", color=DARK, label="reference point (0.6, 0.45)")
    return _with_legend(figure)


def _roi_pooling() -> Figure:
    torch.manual_seed(2)
    figure, axes = _square("Deformable RoI pooling: 2x2 bins")
    low, length, gamma = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 5.0]), 0.1
    axes.add_patch(Rectangle(tuple(low - 0.5), *length.tolist(), fill=False, color=DARK, linewidth=1.5, label="RoI"))
    size = length / 2
    for row in range(2):
        for column in range(2):
            corner = low - 0.5 + size * torch.tensor([column, row])
            move = gamma * length * torch.randn(2) * 1.5
            moved = corner + move
            axes.add_patch(Rectangle(tuple(corner), *size.tolist(), fill=False, color=GREY, linestyle=":"))
            axes.add_patch(Rectangle(tuple(moved), *size.tolist(), color=BLUE, alpha=0.25))
            _arrow(axes, (corner + size / 2).flip(0), (moved + size / 2).flip(0))
    axes.add_patch(Rectangle((9, 9), 0, 0, color=BLUE, alpha=0.25, label="bins, moved by their offsets"))
    return _with_legend(figure)


def _sampling() -> Figure:
    figure, axes = _square("Deformable sampling: points in pixels, (h, w)")
    points = torch.tensor([[1.3, 1.6], [2.7, 4.2], [4.4, 2.3]])
    axes.plot(points[:, 1], points[:, 0], "o", color=BLUE, label="points")
    for point in points:
        low = point.floor()
        for corner in (low, low + torch.tensor([0, 1]), low + torch.tensor([1, 0]), low + 1):
            axes.plot([point[1], corner[1]], [point[0], corner[0]], color=BLUE, linewidth=0.8, alpha=0.6)
    outside, clamped, mirrored = torch.tensor([5.0, 7.7]), torch.tensor([5.0, 6.0]), torch.tensor([5.0, 5.3])
    axes.set_xlim(-0.6, 8.2)
    axes.plot(outside[1], outside[0], "o", markerfacecolor="none", color=ORANGE, label="outside: 0")
    axes.plot(clamped[1], clamped[0], "s", color=ORANGE, label='"border"')
    axes.plot(mirrored[1], mirrored[0], "D", color=ORANGE, label='"reflect"')
    axes.axvline(6.5, color=GREY, linestyle=":")
    return _with_legend(figure)


FIGURES: dict[str, Callable[[], Figure]] = {
    "conventions_taps": _conventions_taps,
    "conventions_pixels": _conventions_pixels,
    "deform_conv": _convolution,
    "deform_aggregate": _aggregation,
    "ms_deform_attn": _attention,
    "deform_roi_pool": _roi_pooling,
    "deform_sample": _sampling,
}


def _taps(offset: torch.Tensor, position: tuple[int, int]) -> torch.Tensor:
    """Where a 3x3 kernel of padding 1 reads for one output position, ``[9, 2]`` as (h, w)."""
    layer = dk.nn.DeformConv2d(1, 1, 3, padding=1)
    return layer.sampling_locations(offset)[0, 0][(slice(None), *position)]


def _square(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 5), layout="constrained")
    axes = figure.subplots()
    _pixels(axes, 7, 7)
    axes.set_title(title, fontsize=10)
    return figure, axes


def _pixels(axes: Axes, rows: int, columns: int) -> None:
    for row in range(rows):
        for column in range(columns):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#f4f4f4", edgecolor="#cccccc"))
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.set_xticks(range(columns))
    axes.set_yticks(range(rows))
    axes.set_xlabel("w")
    axes.set_ylabel("h")
    axes.spines[:].set_visible(False)


def _numbered(axes: Axes, points: torch.Tensor) -> None:
    for tap, (row, column) in enumerate(points.tolist()):
        axes.plot(column, row, "o", color=BLUE, markersize=16)
        axes.annotate(str(tap), (column, row), ha="center", va="center", color="white", fontsize=9)


def _arrow(axes: Axes, start: torch.Tensor, end: torch.Tensor) -> None:
    """From one (h, w) to another."""
    arrow = {"arrowstyle": "->", "color": ORANGE, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (float(end[1]), float(end[0])), (float(start[1]), float(start[0])), arrowprops=arrow)


def _with_legend(figure: Figure) -> Figure:
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
