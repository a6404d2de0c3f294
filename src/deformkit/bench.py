"""Benchmarks of the operators beside other implementations on this machine, and on shapes of one's own.

The benchmarks of the documentation are made by ``benchmarks/run.py`` in the repository from the same parts.
"""

import os
import platform
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, _kernels
from ._environment import processor
from ._testing import half_of_digits
from ._testing.cases import ROOMS, about
from ._testing.gate import cotangent, error, truth
from ._testing.rivals import ABSENT, DEFINITION, EVERYONE, OURS, PACKAGES, PLAIN, Call, Unfit, rivals
from ._testing.timing import alternate as alternate

PASSES = ("forward", "forward + backward")

# A process that waits for nothing adds 1 to the load of its core.
_BUSY = 0.5


def rows(
    cases: Iterable[Any],
    names: Collection[str],
    seconds: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    passes: Sequence[str] = PASSES,
    least: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Check every implementation against the reference, then time those that are right, in turn.

    Args:
        cases: of :mod:`deformkit._testing.cases`.
        names: the implementations, such as ``"deformkit"``, ``"reference"``, ``"plain"`` and ``"torchvision"``; those
            that do not implement the operator are left out.
        seconds: how long to time each call.
        dtype: of the values; coordinates keep the dtype that the operator asks for.
        device: where to run.
        passes: of :data:`PASSES`.
        least: the smallest number of samples; see :func:`alternate`.

    Yields:
        For each case and pass a row: ``operator``, ``case``, ``sizes``, ``pass`` and ``rivals``, which has for each
        implementation its ``error`` and the ``median``, ``low`` and ``high`` quartile and number ``n`` of its timings
        in seconds, or the reason why it was ``skipped``.
    """
    wait = None if torch.device(device).type == "cpu" else torch.accelerator.synchronize
    for case in cases:
        calls, notes = gated(case, names, dtype, device)
        for what in passes:
            runs = {name: call.forward() if what == PASSES[0] else call.both() for name, call in calls.items()}
            yield {**about(case), "pass": what, "rivals": timed(runs, notes, seconds, least, wait)}


def timed(
    runs: Mapping[str, Callable[[], object]],
    notes: Mapping[str, Mapping[str, Any]],
    seconds: float,
    least: int | None = None,
    wait: Callable[[], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """The timings of ``runs``, see :func:`alternate`, beside what the ``notes`` say of each implementation."""
    result: dict[str, dict[str, Any]] = {name: dict(note) for name, note in notes.items()}
    for name, timing in alternate(runs, seconds, least=least, wait=wait).items():
        low, high = timing.spread
        numbers = {"median": timing.median, "low": low, "high": high, "n": len(timing.samples)}
        result[name] = {**result.get(name, {}), **numbers}
    return result


def gated(
    case: Any, names: Collection[str], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The calls whose output and gradients are right, and what was found about each implementation."""
    arguments = case.arguments(dtype, device)
    exact = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    expected, weights = truth(case, arguments, exact), cotangent(case, arguments)
    calls: dict[str, Call] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name, adapter in rivals(case, names).items():
        try:
            call = _adapted(name, adapter, case, arguments)
            notes[name] = {} if name == PLAIN else {"error": error(call, expected, weights)}
        except Unfit as reason:
            notes[name] = {"skipped": str(reason)}
            continue
        except Exception as failure:  # whatever another library raises is a reason not to time it
            if name == OURS:
                raise
            notes[name] = {"skipped": f"failed: {type(failure).__name__}"}
            print(f"{case.name}: {name} failed: {failure}", file=sys.stderr)
            continue
        if not notes[name].get("error", 0.0) <= half_of_digits(dtype):
            notes[name]["skipped"] = f"wrong: error {notes[name]['error']:.2g}"
            continue
        calls[name] = call
    return calls, notes


def _adapted(name: str, adapter: Any, case: Any, arguments: dict[str, Any]) -> Call:
    if name in ABSENT:
        raise Unfit("not installed")
    return adapter(case, arguments)


def planned(
    case: Any, names: Collection[str], dtype: torch.dtype, device: str
) -> tuple[list[list[str]], list[list[str]]]:
    """What :func:`rows` would do: rows of the tensors of the call, and of the implementations."""
    arguments = case.arguments(dtype, device)
    tensors, implementations = [], []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            mib = value.numel() * value.element_size() / 2**20
            shape = "x".join(map(str, value.shape))
            tensors.append([name, shape, str(value.dtype).removeprefix("torch."), f"{mib:.1f} MiB"])
        else:
            tensors.append([name, str(value), "", ""])
    for name, adapter in rivals(case, names).items():
        try:
            _adapted(name, adapter, case, arguments)
            implementations.append([name, "is checked and timed" if name != PLAIN else "is timed"])
        except Unfit as reason:
            implementations.append([name, str(reason)])
    return tensors, implementations


def quick() -> list[Any]:
    """The smallest benchmark of each operator and number of axes, with a batch of one."""
    cases = []
    for room in ROOMS.values():
        few = [replace(case, batch=1) for case in room.BENCHMARKS]
        cases += [
            min((case for case in few if case.axes == axes), key=_size) for axes in sorted({case.axes for case in few})
        ]
    return cases


def installed() -> list[str]:
    """The implementations that are timed where none are named: all but the reference, which takes long."""
    return [name for name in EVERYONE if name not in DEFINITION]


def origin() -> dict[str, Any]:
    """The machine and the versions that a document of results is from."""
    selection = _kernels.selection
    versions = {"python": platform.python_version(), "torch": torch.__version__, "deformkit": __version__}
    present = {name: metadata.version(name) for name in PACKAGES if name not in ABSENT}
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": selection.capability,
            "kernels": selection.isa or "none (the reference answers)",
            "load": load(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {**versions, **present},
        "absent": ABSENT,
    }


def load() -> float | None:
    """The mean number of running processes of the last minute; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy() -> str | None:
    """A warning if other programs keep the machine busy."""
    found = load()
    if found is None or found < _BUSY:
        return None
    return f"the load of this machine is {found:g} on {os.cpu_count()} cores: other programs disturb the timings"


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw the timings of a document of results: a bar for each implementation, with its quartiles."""
    from matplotlib.figure import Figure

    found = [row for row in document["rows"] if any("median" in timed for timed in row["rivals"].values())]
    bars = [sum("median" in timed for timed in row["rivals"].values()) for row in found]
    figure = Figure(figsize=(8, sum(0.35 * count + 0.75 for count in bars) + 0.4), dpi=150, layout="constrained")
    axes = figure.subplots(len(found), squeeze=False, gridspec_kw={"height_ratios": [count + 1.5 for count in bars]})
    for axis, row in zip(axes[:, 0], found, strict=True):
        timed = {name: entry for name, entry in row["rivals"].items() if "median" in entry}
        medians = [1e3 * entry["median"] for entry in timed.values()]
        spread = [
            [1e3 * (entry["median"] - entry["low"]) for entry in timed.values()],
            [1e3 * (entry["high"] - entry["median"]) for entry in timed.values()],
        ]
        colours = ["#1b6ca8" if name == OURS else "#c9d3dc" if name == PLAIN else "#8a9aa8" for name in timed]
        drawn = axis.barh(list(timed), medians, xerr=spread, color=colours, ecolor="#333333", height=0.7)
        axis.bar_label(
            drawn,
            [f"{median:,.0f} ms" if median >= 100 else f"{median:.3g} ms" for median in medians],
            padding=6,
            fontsize=8,
        )
        axis.set_title(f"{row['operator']} {row['sizes']}: {row['pass']}", fontsize=9, loc="left")
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlim(left=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("median time in ms, with quartiles; shorter is better", fontsize=8)
    machine = document["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['threads']} threads, {document['dtype']}", fontsize=9)
    figure.savefig(path)


def _size(case: Any) -> int:
    return sum(value.numel() for value in case.arguments().values() if isinstance(value, Tensor))
