"""Draws the charts of the performance page from the results of the benchmarks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

OURS, PLAIN = "deformkit", "plain"
# In inches: so narrow that the letters can be read on a telephone, where a page is 3.7 inches wide.
WIDTH = 4.6
PASSES = {"forward": "o", "forward + backward": "s"}
COLOURS = {
    OURS: "#0072b2",
    "torchvision": "#d55e00",
    "dc1d": "#cc79a7",
    "transformers": "#d55e00",
    "grid_sample": "#009e73",
    "reference": "#9a9a9a",
    "compiled": "#e69f00",
}


def draw(results_folder: str | Path, output_folder: str | Path) -> None:
    """Write ``convolution.svg``, ``attention_aggregation.svg`` and ``models.svg``."""
    results, output = Path(results_folder), Path(output_folder)
    output.mkdir(parents=True, exist_ok=True)
    rows = {name: json.loads((results / f"{name}.json").read_text())["rows"] for name in SECTIONS}
    for name, figure in {
        "convolution": _convolution(rows["conv"]),
        "attention_aggregation": _faster([*rows["attn"], *rows["aggregate"]]),
        "models": _models(rows["models"]),
    }.items():
        figure.savefig(output / f"{name}.svg")


SECTIONS = ("conv", "attn", "aggregate", "models")


def _convolution(rows: Sequence[dict[str, Any]]) -> Figure:
    libraries = [OURS, "torchvision", "dc1d", "compiled"]
    figure = _dots(rows, libraries, lambda found, name: found[name]["median"] / found[PLAIN]["median"])
    axes = figure.axes[0]
    figure.suptitle("Deformable convolution", fontweight="bold", fontsize=11)
    axes.set_xlabel("time as a multiple of the plain convolution's\n(lower is better)")
    return figure


def _faster(rows: Sequence[dict[str, Any]]) -> Figure:
    libraries = ["transformers", "grid_sample", "reference", "compiled"]
    figure = _dots(rows, libraries, lambda found, name: found[name]["median"] / found[OURS]["median"])
    axes = figure.axes[0]
    figure.suptitle("Attention and aggregation", fontweight="bold", fontsize=11)
    axes.set_xlabel("time as a multiple of deformkit's")
    return figure


def _dots(rows: Sequence[dict[str, Any]], libraries: Sequence[str], ratio: Any) -> Figure:
    """One line for each case; a circle is the forward pass, a square forward and backward."""
    # Two operators may have cases of the same name.
    cases = list(dict.fromkeys((row.get("operator", "deform_conv"), row["case"]) for row in rows))
    several = len({operator for operator, _ in cases}) > 1
    figure = Figure(figsize=(WIDTH, 1.8 + 0.4 * len(cases)), layout="constrained")
    axes = figure.subplots()
    seen = set()
    for row in rows:
        place, found = cases.index((row.get("operator", "deform_conv"), row["case"])), row["rivals"]
        for name in libraries:
            if "median" in found.get(name, {}):
                seen.add(name)
                shift = -0.15 if row["pass"] == "forward" else 0.15
                marker = PASSES[row["pass"]]
                axes.plot(ratio(found, name), place + shift, marker, color=COLOURS[name], markersize=6)
    for name in libraries:
        if name in seen:
            axes.plot([], [], "o", color=COLOURS[name], label=name)
    for what, marker in PASSES.items():
        axes.plot([], [], marker, color="none", markeredgecolor="black", label=what)
    axes.set_yticks(
        range(len(cases)), [f"{operator}\n{case}" if several else case for operator, case in cases], fontsize=9
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    _ticks(axes)
    _plain_style(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    steps = [step for step in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= step <= high]
    axes.set_xticks(steps)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _models(rows: Sequence[dict[str, Any]]) -> Figure:
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(WIDTH, 1.4 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = {"forward": COLOURS[OURS], "forward + backward": "#56b4e9"}
    for row in rows:
        found = row["rivals"]
        if "median" in found["transformers"] and "median" in found[OURS]:
            gain = found["transformers"]["median"] / found[OURS]["median"]
            shift = -0.19 if row["pass"] == "forward" else 0.19
            place = names.index(row["case"]) + shift
            axes.barh(place, gain, height=0.36, color=colours[row["pass"]])
            axes.annotate(f"{gain:.2f}x", (gain, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    for what, colour in colours.items():
        axes.barh([0], [0], color=colour, label=what)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    figure.suptitle("Models of transformers after\ndeformkit.patch(model)", fontweight="bold", fontsize=11)
    axes.set_xlabel("time before divided by time after")
    _plain_style(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _plain_style(axes: Axes) -> None:
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
