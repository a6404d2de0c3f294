"""Writes the tables of the two GPU pages between their marks: ``python benchmarks/gpu_page.py``.

``docs/gpu.md`` gets what was measured, from ``results/gpu.json`` if there is one. ``docs/gpu_developers.md`` gets the
computed floors and the results of the offline compiler.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import floors
from gpu_cases import CASES, DTYPES, NEAR, _has

from deformkit._testing.cases import operator

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
OFFLINE, MEASURED = HERE / "results" / "offline.json", HERE / "results" / "gpu.json"
OURS = "deformkit"
PASSES = {"forward": floors.forward, "forward + backward": floors.both}


def pages() -> dict[Path, str]:
    """The text of each page with its tables made anew."""
    results = json.loads(MEASURED.read_text()) if MEASURED.exists() else None
    parts = {
        "gpu.md": {"measured": measured(results) if results else "No GPU has been measured yet."},
        "gpu_developers.md": {
            "floors": floor_tables(results),
            "offline": offline_tables(json.loads(OFFLINE.read_text())),
        },
    }
    return {DOCS / name: _filled((DOCS / name).read_text(), tables) for name, tables in parts.items()}


def save() -> None:
    for path, text in pages().items():
        path.write_text(text)


def _filled(text: str, tables: dict[str, str]) -> str:
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        text, count = mark.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
        assert count == 1, f"the page has {count} pairs of marks for {name}; expected one"
    return text


def floor_tables(results: dict[str, Any] | None) -> str:
    head = ["case", "dtype", "memory", "matrix", "vector", "gather", "scatter", "floor", "predicted"]
    head += ["measured"] * (results is not None)
    parts = []
    for name in DTYPES:
        for what, work in PASSES.items():
            lines = []
            for case in CASES:
                if operator(case) == name:
                    for dtype in (str(d).removeprefix("torch.") for d in DTYPES[name]):
                        amount = work(case, dtype)
                        parts_of_it = [f"{1e6 * s:.0f}" for s in amount.seconds(dtype).values()]
                        ends = [f"{1e6 * value(amount, dtype):.0f}" for value in (floors.floor, floors.predicted)]
                        found = [_found(results, case, dtype, what)] if results else []
                        lines.append([str(case), dtype, *parts_of_it, *ends, *found])
            parts.append(_folded(f"{name}: {what}", _table(head, lines)))
    return "\n\n".join(parts)


def _folded(title: str, body: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def _found(results: dict[str, Any], case: Any, dtype: str, what: str) -> str:
    points = NEAR if _has(case, NEAR) else "uniform"
    for row in results["rows"]:
        if (row["sizes"], row["dtype"], row["pass"], row["points"]) == (str(case), dtype, what, points):
            return f"{1e6 * row['rivals'][OURS]['device']['median']:.0f}"
    return ""


def offline_tables(document: dict[str, Any]) -> str:
    rows = document["rows"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    keys = ("operator", "case", "kernel", "dtype", "deterministic")
    parts = [f"Triton {document['triton']}."]
    for name in dict.fromkeys(row["operator"] for row in rows):
        lines = []
        for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows if row["operator"] == name):
            found = {row["target"]: row for row in rows if tuple(row[k] for k in keys) == key}
            _, case, kernel, dtype, deterministic = key
            cells = [_facts(found[target]) if target in found else "" for target in targets]
            lines.append([f"`{kernel}`", case, dtype, "yes" if deterministic else "no", *cells])
        parts.append(_folded(name, _table(["kernel", "case", "dtype", "deterministic", *targets], lines)))
    return "\n\n".join(parts)


def _facts(row: dict[str, Any]) -> str:
    facts = [str(row["registers"]), f"{row['shared']} B"]
    facts += [f"**spills {row['spilled']}**"] * bool(row["spilled"])
    wide = max((int((re.findall(r"F32x(\d)", opcode) or ["1"])[0]) for opcode in row["atomics"]), default=0)
    facts += [f"adds {wide}"] * bool(wide)
    facts += sorted({re.split(r"[._]16|[.]|_f", opcode)[0] for opcode in row["matrix"]})
    return ", ".join(facts)


def measured(document: dict[str, Any]) -> str:
    device = document["device"]
    about = f"{device['name']}, {', '.join(f'{k} {v}' for k, v in document['versions'].items())}."
    if document["clocks"]:
        about += f" {document['clocks']['now']} of {document['clocks']['most']} MHz at the start."
    if document["absent"]:
        about += f" Not installed: {', '.join(document['absent'])}."
    if device["interpreted"]:
        about += " **No GPU: this says what ran and what it computed, and nothing of how fast.**"
    parts = [about]
    if document["red"]:
        import red

        parts += ["### Additions into memory, 10^12 numbers a second", red.table(document["red"])]
    for name in dict.fromkeys(row["operator"] for row in document["rows"]):
        for what in PASSES:
            rows = [row for row in document["rows"] if (row["operator"], row["pass"]) == (name, what)]
            parts += [f"### {name}: {what}", _measured_table(rows)]
    return "\n\n".join(parts)


def _measured_table(rows: Sequence[dict[str, Any]]) -> str:
    rivals = list(dict.fromkeys(name for row in rows for name in row["rivals"] if name != OURS))
    both = any("deterministic" in row for row in rows)
    head = ["case", "points", "dtype", "device µs", "wall µs", "error", "extra MiB"]
    lines, ratios = [], {name: [] for name in rivals}
    for row in rows:
        ours = row["rivals"][OURS]
        cells = [row["sizes"], row["points"], row["dtype"]]
        if "skipped" in ours:
            lines.append([*cells, ours["skipped"], *[""] * (3 + len(rivals) + both)])
            continue
        memory = "" if ours["memory"] is None else f"{ours['memory'] / 2**20:.0f}"
        cells += [_micro(ours["device"]), _micro(ours["wall"]), f"{ours['error']:.0e}", memory]
        for name in rivals:
            other = row["rivals"].get(name, {})
            if "device" in other:
                ratio = _ratio(other["device"], ours["device"])
                ratios[name] += [ratio] if ratio else []
                cells.append(f"{_times(ratio)}, error {other['error']:.0e}")
            else:
                cells.append(other.get("skipped", ""))
        if both:
            exact = row["deterministic"]
            ratio = _times(_ratio(exact["device"], ours["device"]))
            cells.append(f"{ratio}, {'same bits' if exact['same_bits'] else '**bits differ**'}")
        lines.append(cells)
    means = [f"{geometric_mean(values):.2f}x" if values else "" for values in ratios.values()]
    if any(means):
        lines.append(["geometric mean", *[""] * 6, *means, *[""] * both])
    return _table([*head, *rivals, *["deterministic"] * both], lines)


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    return one["median"] / other["median"] if one else None


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}x" if ratio else "ran"


def _micro(timing: dict[str, Any]) -> str:
    if not timing:
        return "ran"
    by = "" if timing.get("by") in (None, "graph") else f", {timing['by']}"
    return f"{1e6 * timing['median']:.1f} ({1e6 * timing['low']:.1f} to {1e6 * timing['high']:.1f}{by})"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    save()
