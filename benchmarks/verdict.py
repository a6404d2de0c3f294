"""Shows which targets of ``targets.py`` the saved results meet: ``python benchmarks/verdict.py [avx512|avx2]``."""

import argparse
from collections.abc import Iterable, Iterator
from statistics import geometric_mean
from typing import Any

import targets
from table import MAIN, OURS, PAGES, PASSES, PLAIN, SECTION_OF, _timed, load, ratios_of

PRODUCTS = ("deform_conv", "deform_conv_transpose")
"""Operators that multiply matrices."""


def verdicts(by_section: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, float, bool]]:
    """The description, the figure, the target, and whether it is met."""
    rows = {section: document["rows"] for section, document in by_section.items()}
    for table in targets.TABLES:
        for name, pair in table.targets.items():
            for what, aim in zip(PASSES, pair, strict=True):
                ratios = ratios_of(rows.get(SECTION_OF[table.operator], ()), table, name, what)
                if ratios:
                    mean = geometric_mean(ratios)
                    yield f"{table.title}, {what}: {name}", mean, aim, mean <= aim if name == PLAIN else mean >= aim
    for (operator, what), ratios in _of_half(rows.get("half", ())).items():
        for name, values in ratios.items():
            products = operator in PRODUCTS and name == "bfloat16" and by_section["half"]["machine"]["kernels"] == MAIN
            aim = targets.HALF_OF_PRODUCTS if products else targets.HALF[name]
            mean = geometric_mean(values)
            yield f"{name}, {operator}, {what}", mean, aim, mean <= aim
    for row in rows.get("memory", ()):
        size = row["rivals"][OURS].get("workspace", float("inf"))
        yield f"bytes, {row['sizes']}, {row['pass']}", size, targets.WORKSPACE, size <= targets.WORKSPACE
    for row in rows.get("growth", ()):
        if "speedup" in row:
            speedup = row["speedup"]
            yield f"two threads, {row['sizes']}, {row['pass']}", speedup, targets.THREADS, speedup >= targets.THREADS
        else:
            far = max(abs(value - 1) for value in list(row["linear"].values())[1:])
            yield f"linear, {row['sizes']}, {row['grows']}", far, targets.LINEAR, far <= targets.LINEAR
    for row in rows.get("overhead", ()):
        aim = targets.OVERHEAD.get(row["pass"])
        if aim:
            yield f"overhead, {row['sizes']}, {row['pass']}", row["overhead"], aim, row["overhead"] <= aim
    for row in rows.get("models", ()):
        aim = targets.MODELS.get(row["case"], {}).get(row["pass"])
        if aim and _timed("transformers", row):
            gain = row["rivals"]["transformers"]["median"] / row["rivals"][OURS]["median"]
            yield f"{row['case']}, {row['pass']}", gain, aim, gain >= aim


def _of_half(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """What each half precision takes of float32's time, by operator and pass."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        rivals = row["rivals"]
        for name in targets.HALF:
            if "median" in rivals[name]:
                ratios = found.setdefault((row["operator"], row["pass"]), {}).setdefault(name, [])
                ratios.append(rivals[name]["median"] / rivals["float32"]["median"])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The targets, and which of them the saved results meet.")
    parser.add_argument("kernels", nargs="?", choices=list(PAGES), default=MAIN, help=f"default: {MAIN}")
    for what, figure, aim, met in verdicts(load(parser.parse_args().kernels)):
        print(f"{'met' if met else 'MISSED':7}{figure:<12.4g}{aim:<12.4g}{what}")
