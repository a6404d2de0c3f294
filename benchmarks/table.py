"""Turns ``results/*.json`` into ``docs/benchmarks.md``: ``python benchmarks/table.py``."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import targets

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"
PASSES = ("forward", "forward + backward")
OURS, PLAIN = "deformkit", "plain"
MIB = 2**20


def page(documents: Iterable[dict[str, Any]]) -> str:
    by_section = {document["section"]: document for document in documents}
    parts = ["# Benchmarks", "Made by `benchmarks/table.py` from `benchmarks/results`; see `benchmarks/README.md`."]
    for name, (title, render) in SECTIONS.items():
        if name in by_section:
            document = by_section[name]
            parts += [f"## {title}", *render(document["rows"]), _origin(document)]
    return "\n\n".join(parts) + "\n"


def against(operator: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    plain = (
        " Under `plain`, the convolution of the same shape without deformation: ours takes that many times its time."
    )
    yield (
        "`2.0x` under a rival: ours takes half of its time."
        f"{plain if PLAIN in rows[0]['rivals'] else ''} Medians of calls in turn in one process."
    )
    tables = [table for table in targets.TABLES if table.operator == operator]
    listed = {name for table in tables for name in table.cases}
    rest = tuple(dict.fromkeys(row["case"] for row in rows if row["case"] not in listed))
    for table in [*tables, targets.Table(operator, "Others", rest, {})]:
        for index, what in enumerate(PASSES):
            chosen = [row for row in rows if row["case"] in table.cases and row["pass"] == what]
            if chosen:
                yield f"### {table.title}: {what}"
                yield _against_table(chosen, {name: pair[index] for name, pair in table.targets.items()})


def _against_table(rows: Sequence[dict[str, Any]], aims: dict[str, float]) -> str:
    timed_once = {name for row in rows for name, found in row["rivals"].items() if "median" in found}
    rivals = [name for name in rows[0]["rivals"] if name in timed_once and name != OURS]
    lines, ratios = [], {name: [] for name in rivals}
    for row in rows:
        timed = row["rivals"]
        cells = []
        for name in rivals:
            found = timed.get(name, {})
            if "median" in found and "median" in timed[OURS]:
                ratios[name].append(_ratio(name, timed))
                few = f" (n={found['n']})" if found["n"] < 5 else ""
                cells.append(f"{ratios[name][-1]:.2f}x{few}")
            else:
                cells.append(found.get("skipped", "not run"))
        lines.append([row["sizes"], _time(timed[OURS]), f"{timed[OURS].get('error', float('nan')):.0e}", *cells])
    means = {name: geometric_mean(values) for name, values in ratios.items() if values}
    if len(rows) > 1:
        lines.append(["geometric mean", "", "", *(f"{means[name]:.2f}x" if name in means else "" for name in rivals)])
    if aims:
        lines.append(["target", "", "", *(_aim(name, aims.get(name), means.get(name)) for name in rivals)])
    return _table(["case", "ours", "error", *rivals], lines)


def _ratio(name: str, timed: dict[str, Any]) -> float:
    ratio = timed[name]["median"] / timed[OURS]["median"]
    return 1 / ratio if name == PLAIN else ratio


def _aim(name: str, aim: float | None, mean: float | None) -> str:
    if aim is None or mean is None:
        return ""
    met = mean <= aim if name == PLAIN else mean >= aim
    return f"{'at most' if name == PLAIN else 'at least'} {aim:g}x: {_met(met)}"


def half(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"Time over our float32's. Target: at most {targets.HALF:g}x, by the geometric mean."
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
        lines.append(["geometric mean", "", *(f"{mean:.2f}x, {_met(mean <= targets.HALF)}" for mean in means)])
        yield f"### {title}"
        yield _table(["case", "float32", *ratios], lines)


def memory(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Peak resident memory beyond inputs, outputs and gradients, in MiB; how it is measured stands in "
        f"`benchmarks/memory.py`. Target for ours: at most {targets.WORKSPACE // MIB} at any size."
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
            lines.append([row["sizes"], *cells, _met(found[OURS].get("workspace", float("inf")) <= targets.WORKSPACE)])
        yield f"### {title}"
        yield _table(["case", *rivals, "target"], lines)


def growth(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    sizes, threads = [row for row in rows if "linear" in row], [row for row in rows if "speedup" in row]
    if sizes:
        factors = list(sizes[0]["linear"])
        yield (
            f"Time per unit of work on one thread, over that at {factors[1]}x: 1.00 is linear. Target: within "
            f"{targets.LINEAR:.0%} from {factors[1]}x on."
        )
        lines = []
        for row in sizes:
            linear = list(row["linear"].values())
            straight = all(abs(value - 1) <= targets.LINEAR for value in linear[1:])
            what = f"{_operator(row)} {row['sizes']}, {row['grows']}"
            lines.append([what, row["pass"], *(f"{v:.2f}" for v in linear), _met(straight)])
        yield _table(["grows from", "pass", *(f"{factor}x" for factor in factors), "target"], lines)
    if threads:
        yield f"One thread against two; target: at least {targets.THREADS:g}x, and the same bits at 1, 2 and 3 threads."
        for title, chosen in _groups(threads):
            lines = [
                [row["sizes"], f"{row['speedup']:.2f}x", _met(row["speedup"] >= targets.THREADS), _yes(row["same"])]
                for row in chosen
            ]
            mean = geometric_mean([row["speedup"] for row in chosen])
            lines.append(["geometric mean", f"{mean:.2f}x", _met(mean >= targets.THREADS), ""])
            yield f"### {title}"
            yield _table(["case", "2 threads", "target", "same bits"], lines)


def overhead(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Microseconds of a small call; over the kernel is what everything but the kernel costs."
    for operator in dict.fromkeys(_operator(row) for row in rows):
        chosen = [row for row in rows if _operator(row) == operator]
        rivals = list(dict.fromkeys(name for row in chosen for name in row["times"]))
        lines = []
        for row in chosen:
            cells = [f"{1e6 * row['times'][name]:.1f}" if name in row["times"] else "" for name in rivals]
            aim = targets.OVERHEAD.get(row["pass"])
            verdict = f"at most {1e6 * aim:.0f}: {_met(row['overhead'] <= aim)}" if aim else ""
            lines.append([row["sizes"], row["pass"], *cells, f"{1e6 * row['overhead']:.1f}", verdict])
        yield f"### {operator}"
        yield _table(["case", "pass", *rivals, "over the kernel", "target"], lines)


def models(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Whole models of transformers with random weights and one image, before and after `deformkit.patch(model)`; "
        "`2.00x`: it then takes half of its time. The rest of a model is what it was. Apart: the relative distance of "
        "the outputs, or of the gradient by all parameters."
    )
    for what in PASSES:
        chosen, lines = [row for row in rows if row["pass"] == what], []
        for row in chosen:
            found = row["rivals"]
            timed_both = all("median" in found[name] for name in ("transformers", OURS))
            ratio = found["transformers"]["median"] / found[OURS]["median"] if timed_both else float("nan")
            aim = targets.MODELS.get(row["case"], {}).get(what)
            verdict = f"at least {aim:g}x: {_met(ratio >= aim)}" if aim else ""
            times = [_time(found["transformers"]), _time(found[OURS])]
            lines.append([row["case"], row["sizes"], str(row["parts"]), *times, f"{ratio:.2f}x"])
            lines[-1] += [f"{found[OURS]['error']:.0e}", verdict]
        if chosen:
            yield f"### Models: {what}"
            yield _table(["model", "image", "replaced", "before", "after", "faster", "apart", "target"], lines)


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each operator and pass, with a title."""
    for operator, what in product(dict.fromkeys(_operator(row) for row in rows), PASSES):
        chosen = [row for row in rows if (_operator(row), row["pass"]) == (operator, what)]
        if chosen:
            yield f"{operator}: {what}", chosen


def _operator(row: dict[str, Any]) -> str:
    # A row that does not say is of the first operator.
    return row.get("operator", "deform_conv")


OPERATORS = {
    "conv": "deform_conv",
    "attn": "ms_deform_attn",
    "aggregate": "deform_aggregate",
    "roi": "deform_roi_pool",
}
"""The sections that compare one operator with others."""

SECTIONS = {
    "conv": ("Deformable convolution against others", partial(against, "deform_conv")),
    "attn": ("Multi-scale deformable attention against others", partial(against, "ms_deform_attn")),
    "aggregate": ("Deformable aggregation against others", partial(against, "deform_aggregate")),
    "roi": ("Deformable RoI pooling against others", partial(against, "deform_roi_pool")),
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
    if "median" not in found:
        return found["skipped"]
    return f"{1e3 * found['median']:.2f} ms ({1e3 * found['low']:.2f} to {1e3 * found['high']:.2f}, n={found['n']})"


def _met(yes: bool) -> str:
    return "met" if yes else "**missed**"


def _yes(yes: bool) -> str:
    return "yes" if yes else "**no**"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def load(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """The results that are sections of this page; other programs keep theirs beside them."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json")) if path.stem in SECTIONS]


if __name__ == "__main__":
    PAGE.write_text(page(load()))
    print(PAGE.relative_to(HERE.parent))
