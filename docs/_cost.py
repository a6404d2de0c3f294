"""Writes the table of measured costs from the results of the benchmarks."""

import json
from pathlib import Path

PASSES = ("forward", "forward + backward")
# What is compared with what: the results, the first words of their cases, and the library that it is measured beside.
LINES = (
    ("`deform_conv1d`", "conv", "1d", "plain", "plain convolution"),
    ("`deform_conv2d` with mask", "conv", "2d", "plain", "plain convolution"),
    ("`deform_conv3d`", "conv", "3d", "plain", "plain convolution"),
    ("`deform_aggregate`, 2-D", "aggregate", "2d", "grid_sample", "`grid_sample`"),
    ("`ms_deform_attn`, 2-D", "attn", "2d", "transformers", "transformers"),
)


def draw(results_folder: Path, output: Path) -> None:
    """Write ``output``, a table in Markdown."""
    head = ["operator", "beside", *PASSES]
    table = [head, ["---"] * len(head)]
    for title, name, start, rival, described in LINES:
        rows = json.loads((results_folder / f"{name}.json").read_text())["rows"]
        table.append([title, described, *(_range(rows, start, rival, which) for which in PASSES)])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(f"| {' | '.join(cells)} |\n" for cells in table))


def _range(rows: list[dict], start: str, rival: str, which: str) -> str:
    found = [row["rivals"] for row in rows if row["case"].startswith(start) and row["pass"] == which]
    ratios = [rivals["deformkit"]["median"] / rivals[rival]["median"] for rivals in found if "median" in rivals[rival]]
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"
