"""Turns the results into the pages of the documentation about performance: ``python benchmarks/table.py``.

The folder ``results`` has a folder of results for each instruction set of the kernels.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import targets

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
MAIN, OTHER = "avx512", "avx2"
PAGES = {MAIN: DOCS / "benchmarks.md", OTHER: DOCS / "benchmarks_avx2.md"}
"""The page for each instruction set, by the name of the kernels."""

TITLES = {MAIN: "AVX-512", OTHER: "AVX2"}
PASSES = ("forward", "forward + backward")
OURS, PLAIN = "deformkit", "plain"
DEFINITION = ("reference", "compiled")
MIB = 2**20


def write_pages() -> None:
    for kernels, path in PAGES.items():
        path.write_text(page(kernels))


def page(kernels: str) -> str:
    by_section = load(kernels)
    if kernels == MAIN:
        parts = ["# Performance", INTRODUCTION]
        parts += [f"![{alt}](_generated/charts/{name}.svg)" for name, alt in CHARTS.items()]
        parts += ["## Summary", *summary({each: load(each) for each in PAGES})]
    else:
        parts = [f"# Performance on {TITLES[kernels]}", ABOUT_OTHER]
    parts += ["## Where we lose", *losses(by_section), "## Tables"]
    for name, (title, _) in SECTIONS.items():
        if name in by_section:
            parts += [f"### {title}", *map(_folded, section(by_section[name]))]
    return "\n\n".join(parts) + "\n"


def summary(results: Mapping[str, Mapping[str, dict[str, Any]]]) -> Iterator[str]:
    """The means of the tables that have a target, beside the libraries that the target names."""
    named = [(table, rival) for table in targets.TABLES for rival in table.targets if rival not in DEFINITION]
    columns = [(kernels, what) for kernels in results for what in PASSES]
    head = [f"{TITLES[kernels]}, {what}" for kernels, what in columns]

    def mean(table: targets.Table, rival: str, kernels: str, what: str) -> str:
        document = results[kernels].get(SECTION_OF[table.operator], {"rows": ()})
        ratios = ratios_of(document["rows"], table, rival, what)
        return f"{geometric_mean(ratios):.2f}x" if ratios else ""

    yield (
        f"Each figure is the geometric mean of a table: one below for {TITLES[MAIN]}, and one of "
        f"[another page]({PAGES[OTHER].name}) for {TITLES[OTHER]}."
    )
    yield "The time of a convolution as a multiple of the plain one's:"
    plain = [[table.title, *(mean(table, PLAIN, *column) for column in columns)] for table, r in named if r == PLAIN]
    yield _table(["", *head], plain)
    yield "How many times faster deformkit is than another library:"
    others = [[t.title, f"`{r}`", *(mean(t, r, *column) for column in columns)] for t, r in named if r != PLAIN]
    yield _table(["", "than", *head], others)


def ratios_of(rows: Iterable[dict[str, Any]], table: targets.Table, rival: str, what: str) -> list[float]:
    return [
        _ratio(rival, row["rivals"])
        for row in rows
        if (_operator(row), row["pass"]) == (table.operator, what) and row["case"] in table.cases and _timed(rival, row)
    ]


def section(document: dict[str, Any]) -> Iterator[str]:
    """The paragraphs of a section, and its tables under a line with ``####`` and their title."""
    _, render = SECTIONS[document["section"]]
    yield from render(document["rows"])
    yield _origin(document)


def _folded(part: str) -> str:
    title, _, body = part.partition("\n\n")
    if not title.startswith("#### "):
        return part
    # Not a directive of Sphinx: GitHub folds this too.
    return f"<details>\n<summary>{title.removeprefix('#### ')}</summary>\n\n{body}\n\n</details>"


def losses(by_section: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The cases in which deformkit is slower, or hardly faster, in words; all numbers come from the results."""
    if "conv" in by_section:
        rows = by_section["conv"]["rows"]
        plain = {(row["case"], row["pass"]): _ratio(PLAIN, row["rivals"]) for row in rows if _timed(PLAIN, row)}
        slower = {key: value for key, value in plain.items() if value > 1}
        (case, what), most = max(plain.items(), key=lambda item: item[1])
        yield (
            f"A deformable convolution is slower than the plain one in {len(slower)} of {len(plain)} measurements. "
            f"The largest factor is {most:.2f} (`{case}`, {what}); the median is {median(plain.values()):.2f}. "
            "Offset groups and depthwise kernels cost most, because there are more samples for each product."
        )
        others = {
            (name, row["case"], row["pass"]): _ratio(name, row["rivals"])
            for row in rows
            for name in ("torchvision", "dc1d")
            if _timed(name, row)
        }
        if others:
            (name, case, what), least = min(others.items(), key=lambda item: item[1])
            yield f"The smallest advantage over another library is {least:.2f}x, over {name} (`{case}`, {what})."
    if "models" in by_section:
        gains = {
            row["case"]: row["rivals"]["transformers"]["median"] / row["rivals"][OURS]["median"]
            for row in by_section["models"]["rows"]
            if row["pass"] == PASSES[0] and _timed("transformers", row)
        }
        little = {name: gain for name, gain in gains.items() if gain < 1.1}
        if little:
            yield (
                f"Patching gains less than 10 % in {', '.join(f'`{name}` ({g:.2f}x)' for name, g in little.items())}. "
                "Deformable attention is a small part of the time of these models."
            )
    if "overhead" in by_section:
        kind = ("deform_conv", "without gradients")
        rows = [row for row in by_section["overhead"]["rows"] if (row["operator"], row["pass"]) == kind]
        if rows:
            each = [f"{1e6 * row['times'][OURS]:.0f} ({row['case']})" for row in rows]
            theirs = [f"{1e6 * row['times'][PLAIN]:.0f}" for row in rows]
            yield (
                f"A deformable convolution of a tiny input takes {', '.join(each)} microseconds; the plain convolution "
                f"takes {', '.join(theirs)}. The fixed cost of a call matters only for inputs of this size."
            )


def _timed(name: str, row: dict[str, Any]) -> bool:
    return all("median" in row["rivals"].get(each, {}) for each in (name, OURS))


def against(operator: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    tables = [table for table in targets.TABLES if table.operator == operator]
    listed = {name for table in tables for name in table.cases}
    rest = tuple(dict.fromkeys(row["case"] for row in rows if row["case"] not in listed))
    for table in [*tables, targets.Table(operator, "Others", rest, {})]:
        for what in PASSES:
            chosen = [row for row in rows if row["case"] in table.cases and row["pass"] == what]
            if chosen:
                yield f"#### {table.title}: {what}\n\n{_against_table(chosen)}"


def _against_table(rows: Sequence[dict[str, Any]]) -> str:
    timed_once = {name for row in rows for name, found in row["rivals"].items() if "median" in found}
    rivals = [name for name in rows[0]["rivals"] if name in timed_once and name != OURS]
    lines, ratios = [], {name: [] for name in rivals}
    for row in rows:
        timed = row["rivals"]
        cells = []
        for name in rivals:
            if _timed(name, row):
                ratios[name].append(_ratio(name, timed))
                cells.append(f"{ratios[name][-1]:.2f}x")
            else:
                cells.append(timed.get(name, {}).get("skipped", "not run"))
        lines.append([row["sizes"], _time(timed[OURS]), f"{timed[OURS].get('error', float('nan')):.0e}", *cells])
    means = {name: geometric_mean(values) for name, values in ratios.items() if values}
    if len(rows) > 1:
        lines.append(["geometric mean", "", "", *(f"{means[name]:.2f}x" if name in means else "" for name in rivals)])
    return _table(["case", "ours", "error", *rivals], lines)


def _ratio(name: str, timed: dict[str, Any]) -> float:
    """The time of the library divided by that of deformkit; for ``plain`` the inverse."""
    ratio = timed[name]["median"] / timed[OURS]["median"]
    return 1 / ratio if name == PLAIN else ratio


def half(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "The time of each dtype is given as a multiple of our time in float32."
    for title, chosen in _groups(rows):
        lines, ratios = [], {"bfloat16": [], "float16": []}
        for row in chosen:
            timed, cells = row["rivals"], []
            for name, values in ratios.items():
                if "median" in timed[name]:
                    values.append(timed[name]["median"] / timed["float32"]["median"])
                cells.append(f"{values[-1]:.2f}x" if "median" in timed[name] else timed[name]["skipped"])
            lines.append([row["sizes"], _time(timed["float32"]), *cells])
        means = [geometric_mean(values) if values else float("nan") for values in ratios.values()]
        lines.append(["geometric mean", "", *(f"{mean:.2f}x" for mean in means)])
        yield f"#### {title}\n\n{_table(['case', 'float32', *ratios], lines)}"


def memory(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Peak resident memory in MiB beyond inputs, outputs and gradients. `benchmarks/memory.py` describes the "
        "measurement."
    )
    for title, chosen in _groups(rows):
        rivals = list(dict.fromkeys(name for row in chosen for name in row["rivals"]))
        lines = []
        for row in chosen:
            found = row["rivals"]
            cells = [
                f"{found[name]['workspace'] / MIB:.0f}" if "workspace" in found[name] else found[name]["skipped"]
                for name in rivals
            ]
            lines.append([row["sizes"], *cells])
        yield f"#### {title}\n\n{_table(['case', *rivals], lines)}"


def growth(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    sizes, threads = [row for row in rows if "linear" in row], [row for row in rows if "speedup" in row]
    if sizes:
        factors = list(sizes[0]["linear"])
        lines = []
        for row in sizes:
            what = f"{_operator(row)} {row['sizes']}, {row['grows']}"
            lines.append([what, row["pass"], *(f"{value:.2f}" for value in row["linear"].values())])
        yield (
            f"The first table gives the time per unit of work on one thread, divided by that at {factors[1]}x. A value "
            "of 1.00 means that time grows linearly."
        )
        head = ["grows from", "pass", *(f"{factor}x" for factor in factors)]
        yield f"#### Time against size\n\n{_table(head, lines)}"
    if threads:
        yield "The other tables compare two threads with one, and results at 1, 2 and 3 threads bit by bit."
        for title, chosen in _groups(threads):
            lines = [[row["sizes"], f"{row['speedup']:.2f}x", _yes(row["same"])] for row in chosen]
            mean = geometric_mean([row["speedup"] for row in chosen])
            lines.append(["geometric mean", f"{mean:.2f}x", ""])
            yield f"#### {title}\n\n{_table(['case', '2 threads', 'same bits'], lines)}"


def overhead(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Time of one small call in microseconds. The last column is our time without that of the kernel."
    for operator in dict.fromkeys(_operator(row) for row in rows):
        chosen = [row for row in rows if _operator(row) == operator]
        rivals = list(dict.fromkeys(name for row in chosen for name in row["times"]))
        lines = []
        for row in chosen:
            cells = [f"{1e6 * row['times'][name]:.1f}" if name in row["times"] else "" for name in rivals]
            lines.append([row["sizes"], row["pass"], *cells, f"{1e6 * row['overhead']:.1f}"])
        yield f"#### {operator}\n\n{_table(['case', 'pass', *rivals, 'without kernel'], lines)}"


def models(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Models of transformers with random weights and one image, before and after `deformkit.patch(model)`. "
        "`difference` is the relative difference of the outputs, or of the gradients of all parameters."
    )
    for what in PASSES:
        chosen, lines = [row for row in rows if row["pass"] == what], []
        for row in chosen:
            found = row["rivals"]
            both = _timed("transformers", row)
            ratio = found["transformers"]["median"] / found[OURS]["median"] if both else float("nan")
            times = [_time(found["transformers"]), _time(found[OURS])]
            lines.append([row["case"], row["sizes"], str(row["parts"]), *times, f"{ratio:.2f}x"])
            lines[-1].append(f"{found[OURS]['error']:.0e}")
        if chosen:
            head = ["model", "image", "replaced", "before", "after", "faster", "difference"]
            yield f"#### Models: {what}\n\n{_table(head, lines)}"


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each operator and pass, with a title."""
    for operator, what in product(dict.fromkeys(_operator(row) for row in rows), PASSES):
        chosen = [row for row in rows if (_operator(row), row["pass"]) == (operator, what)]
        if chosen:
            yield f"{operator}: {what}", chosen


def _operator(row: dict[str, Any]) -> str:
    # A row without an operator belongs to the first one.
    return row.get("operator", "deform_conv")


INTRODUCTION = """\
All figures were measured on a CPU. No GPU has been measured yet; see [GPU](gpu.md).

deformkit and the other libraries run in one process and take turns call by call. Each figure is a ratio of medians.
No time is given for a result that disagrees with the float64 reference implementation. The quartiles and the number of
calls are in `benchmarks/results`; `benchmarks/README.md` explains how to repeat the measurement.

- `plain` is PyTorch's convolution of the same shape, without deformation. A value of 1.30x in its column means that the
  deformable convolution takes 1.30 times the time of the plain one.
- In every other column, 2.00x means that deformkit takes half of that library's time.
- `reference` is the reference implementation of deformkit; `compiled` is `torch.compile` of it.
- `error` is the largest relative error of the output and the gradients, against float64.
- The name of a convolution gives the number of axes, then channels x size (`k7`: kernel size 7; `d3`: dilation 3;
  `og8`: 8 offset groups; `L1024`: length 1024). The tables give the full shapes."""

ABOUT_OTHER = """\
These are the tables of [Performance](benchmarks.md), which explains them, for a processor with AVX2 and no AVX-512."""

CHARTS = {
    "convolution": "Time of deformable convolutions as a multiple of the plain convolution's, for each library",
    "attention_aggregation": "Time of other implementations of attention and aggregation as a multiple of deformkit's",
    "models": "How many times faster models of transformers are after patching",
}
"""The charts that ``docs/_charts.py`` draws from the same results, with the text for who cannot see them."""

OPERATORS = {
    "conv": "deform_conv",
    "transpose": "deform_conv_transpose",
    "attn": "ms_deform_attn",
    "aggregate": "deform_aggregate",
    "roi": "deform_roi_pool",
    "correlate": "deform_correlate",
    "sample": "deform_sample",
    "splat": "deform_splat",
}
"""The sections that compare one operator with others."""

LAYERS = "layers"
SECTION_OF = {**{operator: section for section, operator in OPERATORS.items()}, LAYERS: LAYERS}

SECTIONS = {
    "conv": ("Deformable convolution against others", partial(against, "deform_conv")),
    "transpose": ("Transposed deformable convolution against others", partial(against, "deform_conv_transpose")),
    "attn": ("Multi-scale deformable attention against others", partial(against, "ms_deform_attn")),
    "aggregate": ("Deformable aggregation against others", partial(against, "deform_aggregate")),
    "roi": ("Deformable RoI pooling against others", partial(against, "deform_roi_pool")),
    "correlate": ("Correlation at sampled points against others", partial(against, "deform_correlate")),
    "sample": ("Deformable sampling against others", partial(against, "deform_sample")),
    "splat": ("Splatting against others", partial(against, "deform_splat")),
    LAYERS: ("Layers against operations of torch", partial(against, LAYERS)),
    "half": ("Half precision", half),
    "memory": ("Memory", memory),
    "growth": ("Growth", growth),
    "overhead": ("Small calls", overhead),
    "models": ("Whole models", models),
}


def _origin(document: dict[str, Any]) -> str:
    machine = document["machine"]
    installed = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    absent = f" Not installed: {', '.join(document['absent'])}." if document["absent"] else ""
    return (
        f"*{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, load before "
        f"{machine['load']}, kernels: {machine['kernels']}; {installed}; {document['date']}.{absent}*"
    )


def _time(found: dict[str, Any]) -> str:
    return f"{1e3 * found['median']:.2f} ms" if "median" in found else found["skipped"]


def _yes(yes: bool) -> str:
    return "yes" if yes else "**no**"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def load(kernels: str) -> dict[str, dict[str, Any]]:
    """The results of each section, measured with kernels for this instruction set."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / kernels).glob("*.json"))}


if __name__ == "__main__":
    write_pages()
