"""The pictures of ``Sampling.plot``, drawn by matplotlib."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ._collect import Layer, rescale

_MOST_ARROWS = 32


def position(layer: Layer, at: tuple[int, ...], row: int, background: Tensor | None) -> Figure:
    """The samples of one output position, one colour per level."""
    points, anchor, weights = _samples(layer, at, row, background)
    figure, panels = _panels(layer, background, anchor)
    shades = layer.levels.expand(weights.shape)
    for panel in panels:
        panel.samples(points, weights, shades, len(layer.sizes))
        panel.mark(anchor)
    figure.suptitle(_title(layer, at), fontsize=9)
    if len(layer.sizes) > 1:
        figure.legend(*panels[0].levels(layer), loc="outside lower center", ncols=len(layer.sizes), fontsize=8)
    return figure


def attention(layer: Layer, at: tuple[int, ...], row: int, background: Tensor | None) -> Figure:
    """The samples of one output position: a row of panels per level, a column per head, coloured by weight."""
    points, anchor, weights = _samples(layer, at, row, background)
    levels, heads = len(layer.sizes), weights.shape[0]
    size = _extent(layer, background)
    aspect = min(max(size[-2] / size[-1], 0.4), 2.5) if layer.axes > 1 else 0.6
    figure = Figure(figsize=(1.2 + 2.0 * heads, 0.9 + 2.0 * aspect * levels), dpi=150, layout="constrained")
    grid = figure.subplots(levels, heads, squeeze=False)
    most = max(float(weights.max()), 1e-12)
    drawn = None
    for level in range(levels):
        for head in range(heads):
            panel = _Panel(grid[level, head], layer, background, _plane(layer), anchor)
            chosen = layer.levels == level
            drawn = panel.weighted(points[head, chosen], weights[head, chosen], most)
            panel.mark(anchor)
            panel.bare(f"head {head}" if level == 0 else "", f"level {level}" if head == 0 else "")
    if drawn is not None:
        figure.colorbar(drawn, ax=grid, label="weight", shrink=0.8)
    figure.suptitle(_title(layer, at), fontsize=9)
    return figure


def offsets(layer: Layer, row: int, background: Tensor | None, at: tuple[int, ...]) -> Figure:
    """From each output position to the weighted mean of its samples."""
    size = _extent(layer, background)
    points = layer.on(size)[row]
    weights = layer.weights[row].unsqueeze(-1)
    total = weights.sum((-3, -2))
    mean = (points.nan_to_num(0.0) * weights).sum((-3, -2)) / torch.where(total == 0, torch.nan, total)
    anchors = layer.anchors_on(size)[row]
    figure, panels = _panels(layer, background, anchors[at])
    drawn = [_thinned(layer, anchors, mean, panel.plane, at) for panel in panels]
    times = _magnified(drawn, max(size))
    for panel, (start, end) in zip(panels, drawn, strict=True):
        panel.arrows(start, start + times * (end - start))
    longer = "" if times == 1 else f", {times} times as long"
    figure.suptitle(f"{_name(layer)}\nfrom output positions to the mean of their samples{longer}", fontsize=9)
    return figure


def receptive_field(layer: Layer, field: Tensor, at: tuple[int, ...], row: int, background: Tensor | None) -> Figure:
    """The effective receptive field beside the input."""
    size = tuple(field.shape)
    anchor = layer.anchors_on(size)[(row, *at)]
    figure, panels = _panels(layer, background if background is not None else field.unsqueeze(0), anchor)
    shown = field / max(float(field.max()), 1e-12)
    for panel in panels:
        panel.heat(shown, anchor)
        panel.mark(rescale(anchor, torch.tensor(size), panel.size))
    figure.suptitle(f"{_title(layer, at)}\neffective receptive field", fontsize=9)
    return figure


class _Panel:
    """One pair of axes with the input, seen along one plane (or along the one axis of a sequence)."""

    def __init__(
        self, axis: Any, layer: Layer, background: Tensor | None, plane: tuple[int, ...], anchor: Tensor
    ) -> None:
        self.axis, self.plane = axis, plane
        self.size = _extent(layer, background)
        if len(plane) == 1:
            self._wave = torch.zeros(self.size) if background is None else background[0]
            axis.plot(self._wave.numpy(), color="#4c6078", linewidth=0.9)
            axis.set(xlim=(-0.5, self.size[0] - 0.5), xlabel="position")
            return
        rows, columns = (self.size[n] for n in plane)
        if background is None:
            axis.set_facecolor("#e8ebef")
        else:
            axis.imshow(
                _picture(self._slice(background, anchor)), cmap="gray", aspect="auto" if len(self.size) == 3 else None
            )
        axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
        names = "dhw"[-len(self.size) :]
        axis.set(ylabel=names[plane[0]], xlabel=names[plane[1]])
        axis.set_aspect("equal")

    def _slice(self, values: Tensor, anchor: Tensor) -> Tensor:
        """``values [C, *S]`` on the plane through the anchor."""
        axes = values.dim() - 1
        for axis in reversed(range(axes)):
            if axis not in self.plane:
                index = int(anchor[axis].round().clamp(0, values.shape[axis + 1] - 1))
                values = values.select(axis + 1, index)
        return values

    def coordinates(self, points: Tensor) -> tuple[Any, Any]:
        """``points [..., N]`` as x and y of the panel; on a waveform, y is the interpolated value there."""
        if len(self.plane) == 2:
            return points[..., self.plane[1]].numpy(), points[..., self.plane[0]].numpy()
        x = points[..., 0]
        inside = x.nan_to_num(0.0).clamp(0, self.size[0] - 1)
        low = inside.floor().long()
        high = (low + 1).clamp(max=self.size[0] - 1)
        value = self._wave[low] + (inside - low) * (self._wave[high] - self._wave[low])
        return x.numpy(), value.numpy()

    def samples(self, points: Tensor, weights: Tensor, shades: Tensor, levels: int) -> None:
        area = 60 * (weights / weights.abs().max().clamp(min=1e-12)).abs()
        colours = [_colour(int(level)) for level in shades.flatten()]
        x, y = self.coordinates(points)
        self.axis.scatter(
            x.ravel(), y.ravel(), s=area.flatten().clamp(min=3).numpy(), c=colours, edgecolors="black", linewidths=0.4
        )

    def weighted(self, points: Tensor, weights: Tensor, most: float) -> Any:
        x, y = self.coordinates(points)
        return self.axis.scatter(
            x, y, c=weights.numpy(), s=22, cmap="plasma", vmin=0, vmax=most, edgecolors="white", linewidths=0.4
        )

    def mark(self, anchor: Tensor) -> None:
        x, y = self.coordinates(anchor.unsqueeze(0))
        self.axis.plot(x, y, marker="+", color="#ff2d2d", markersize=10, markeredgewidth=1.6, linestyle="")

    def arrows(self, start: Tensor, end: Tensor) -> None:
        x, y = self.coordinates(start)
        if len(self.plane) == 1:
            self.axis.quiver(x, y, end[:, 0] - start[:, 0], 0 * y, **_ARROWS)
            return
        self.axis.quiver(x, y, *((end - start)[:, n].numpy() for n in reversed(self.plane)), **_ARROWS)

    def heat(self, field: Tensor, anchor: Tensor) -> None:
        if len(self.plane) == 1:
            twin = self.axis.twinx()
            twin.fill_between(range(len(field)), field.numpy(), color="#e4572e", alpha=0.35, linewidth=0)
            twin.set(ylim=(0, 1.05), ylabel="gradient, relative to its maximum")
            return
        plane = self._slice(field.unsqueeze(0), anchor)[0].sqrt().numpy()
        rows, columns = (self.size[n] for n in self.plane)
        extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
        self.axis.imshow(plane, cmap="inferno", alpha=0.75, extent=extent, vmin=0, vmax=1)

    def bare(self, title: str, label: str) -> None:
        self.axis.set_title(title, fontsize=8)
        self.axis.set(xlabel="", ylabel=label, xticks=[], yticks=[])

    @staticmethod
    def levels(layer: Layer) -> tuple[list[Any], list[str]]:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="", marker="o", color=_colour(level), markeredgecolor="black")
            for level in range(len(layer.sizes))
        ]
        return handles, [f"level {n}: {'x'.join(map(str, size))}" for n, size in enumerate(layer.sizes)]


_ARROWS: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "color": "#e4572e", "width": 0.004}


def _colour(level: int) -> str:
    # Okabe and Ito's colours, which colour-blind readers can tell apart.
    return ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00")[level % 7]


def _name(layer: Layer) -> str:
    return f"layer {layer.name}" if layer.name else "model"


def _title(layer: Layer, at: tuple[int, ...]) -> str:
    return f"{_name(layer)}\noutput position {', '.join(map(str, at))}"


def _extent(layer: Layer, background: Tensor | None) -> tuple[int, ...]:
    return layer.sizes[0] if background is None else tuple(background.shape[1:])


def _plane(layer: Layer) -> tuple[int, ...]:
    return (0,) if layer.axes == 1 else (layer.axes - 2, layer.axes - 1)


def _samples(layer: Layer, at: tuple[int, ...], row: int, background: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    size = _extent(layer, background)
    return layer.on(size)[(row, *at)], layer.anchors_on(size)[(row, *at)], layer.weights[(row, *at)]


def _panels(layer: Layer, background: Tensor | None, anchor: Tensor) -> tuple[Figure, list[_Panel]]:
    planes = [(1, 2), (0, 2), (0, 1)] if layer.axes == 3 else [_plane(layer)]
    if layer.axes == 1:
        width, height = 9.0, 3.0
    elif layer.axes == 2:
        rows, columns = _extent(layer, background)
        width, height = 5.0, min(max(5.0 * rows / columns, 2.5), 8.0) + 0.4
    else:
        width, height = 11.0, 3.6
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(planes), squeeze=False)[0]
    return figure, [_Panel(axis, layer, background, plane, anchor) for axis, plane in zip(axes, planes, strict=True)]


def _picture(values: Tensor) -> Any:
    """``[C, H, W]`` as an array for ``imshow``: three channels in colour, any other number by the mean."""
    low, high = values.min(), values.max()
    if values.shape[0] == 3:
        return ((values - low) / (high - low).clamp(min=1e-12)).movedim(0, -1).numpy()
    return values.mean(0).numpy()


def _magnified(arrows: list[tuple[Tensor, Tensor]], size: int) -> int:
    """The whole factor that makes short arrows visible: the longest becomes a thirtieth of the picture."""
    longest = max(float((end - start).nan_to_num(0.0).norm(dim=-1).max()) for start, end in arrows)
    return max(int(size / 30 / longest), 1) if longest > 1e-3 else 1


def _thinned(
    layer: Layer, anchors: Tensor, mean: Tensor, plane: tuple[int, ...], at: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The arrows of a panel: those on its plane, at most ``_MOST_ARROWS`` along each axis."""
    if len(layer.out) != layer.axes:
        step = -(-anchors.flatten(0, -2).shape[0] // _MOST_ARROWS**2)
        return anchors.flatten(0, -2)[::step], mean.flatten(0, -2)[::step]
    index: list[Any] = []
    for axis, n in enumerate(layer.out):
        step = -(-n // (_MOST_ARROWS if layer.axes > 1 else 4 * _MOST_ARROWS))
        index.append(slice(step // 2, None, step) if axis in plane else slice(at[axis], at[axis] + 1))
    return anchors[tuple(index)].flatten(0, -2), mean[tuple(index)].flatten(0, -2)
