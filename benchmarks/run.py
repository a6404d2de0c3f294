"""Benchmarks of the operators: ``python benchmarks/run.py [section ...] [--save]``; see README.md beside this file."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import growth
import layers
import measure
import memory
import models
import overhead
import table
import torch
from zoo import MODELS

from deformkit import bench
from deformkit._testing.cases import ROOMS, operator, tiny
from deformkit._testing.rivals import DEFINITION, EVERYONE, OURS


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    for section in options.sections or table.SECTIONS:
        document = {"section": section, **bench.origin(), "rows": []}
        for row in _rows(section, options):
            print(f"{section}: {row['operator']} {row['sizes']}, {row['pass']}", file=sys.stderr, flush=True)
            document["rows"].append(row)
        print("\n\n".join([f"## {table.SECTIONS[section][0]}", *table.section(document)]), flush=True)
        if options.save:
            folder = table.RESULTS / document["machine"]["kernels"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{section}.json").write_text(json.dumps(document, indent=1) + "\n")
    if options.save:
        table.write_pages()


def _rows(section: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    def chosen(cases: Iterable[Any]) -> list[Any]:
        return [case for case in cases if options.case in f"{operator(case)} {case.name}"]

    seconds = 0.0 if options.tiny else options.seconds
    if section == "models":
        yield from models.rows([name for name in MODELS if options.case in name], seconds, options.tiny)
        return
    if section == table.LAYERS:
        yield from layers.rows(options.case, seconds, options.tiny)
        return
    names = [table.OPERATORS[section]] if section in table.OPERATORS else list(ROOMS)
    small = [case for name in names for case in tiny(name)]
    cases = chosen(small if options.tiny else [case for name in names for case in ROOMS[name].BENCHMARKS])
    libraries = options.rivals or [name for name in EVERYONE if name not in DEFINITION]
    if section in table.OPERATORS:
        yield from bench.rows(cases, options.rivals or EVERYONE, seconds)
    elif section == "half":
        yield from measure.half_rows(cases, seconds)
    elif section == "memory":
        huge = [] if options.tiny else chosen(memory.HUGE)
        yield from memory.rows([*cases, *huge], libraries, torch.get_num_threads())
    elif section == "growth":
        for case in chosen([case for case in small if case.axes == 1] if options.tiny else growth.GROWING):
            yield from growth.size_rows(case, seconds)
        yield from growth.thread_rows(cases, seconds)
    else:
        yield from overhead.rows(chosen(small), libraries, seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks of deformkit's operators.")
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(table.SECTIONS)}; default: all")
    parser.add_argument("--case", default="", help="only cases with this in 'operator name'")
    parser.add_argument(
        "--rivals", type=lambda names: [OURS, *names.split(",")], help="only these, separated by commas"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each call")
    parser.add_argument("--threads", type=int, help="how many threads torch may use")
    parser.add_argument("--tiny", action="store_true", help="tiny cases: whether everything runs, not how fast")
    parser.add_argument("--save", action="store_true", help=f"write {table.RESULTS.name}/ and the pages in docs/")
    options = parser.parse_args()
    for section in options.sections:
        if section not in table.SECTIONS:
            parser.error(f"no section {section}; there are {', '.join(table.SECTIONS)}")
    for name in options.rivals or []:
        if name not in EVERYONE:
            parser.error(f"no rival {name}; there are {', '.join(EVERYONE)}")
    if options.tiny and options.save:
        parser.error("figures of tiny cases are not worth saving")
    return options


if __name__ == "__main__":
    main()
