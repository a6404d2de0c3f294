"""Draws the chart of the start page from the results of the benchmarks."""

import json
from pathlib import Path
from statistics import geometric_mean

from _charts import COLOURS, OURS, PLAIN, WIDTH
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

LIBRARIES = (OURS, "torchvision", "dc1d", "compiled")
PASS = "forward + backward"


def draw(results_folder: Path, output_folder: Path) -> None:
    """Write ``start.svg`` into ``output_folder``."""
    rows = json.loads((results_folder / "conv.json").read_text())["rows"]
    output_folder.mkdir(parents=True, exist_ok=True)
    _figure([row for row in rows if row["pass"] == PASS]).savefig(output_folder / "start.svg")


def _figure(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    names, place = [], 0
    for dimension in ("1d", "2d", "3d"):
        chosen = [row["rivals"] for row in rows if row["case"].startswith(dimension)]
        for library in LIBRARIES:
            timed = [found for found in chosen if "median" in found.get(library, {})]
            if not timed:
                continue
            ratios = [found[library]["median"] / found[PLAIN]["median"] for found in timed]
            mean = geometric_mean(ratios)
            axes.plot([min(ratios), max(ratios)], [place, place], color=COLOURS[library], linewidth=4, alpha=0.3)
            axes.plot(mean, place, "o", color=COLOURS[library], markersize=8)
            axes.annotate(f"{mean:.2g}x", (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
            names.append((place, f"{dimension.replace('d', '-D')} {library}"))
            place += 1
        place += 0.5
    axes.set_yticks(*zip(*names, strict=True))
    axes.set_ylim(place - 0.8, -0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time, as a multiple of the plain convolution's")
    return figure
