"""The command line: ``deformkit doctor | bench | demo | look | plan``."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from . import __version__, _progress, bench, demo, doctor, look
from . import plan as planning
from ._testing.cases import ROOMS, of_shape, operator
from ._testing.rivals import EVERYONE, OURS, PLAIN, ours

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Deformable operators for PyTorch in one, two and three dimensions."""


@app.command("doctor")
def _doctor() -> None:
    """Show which kernels are in use and verify their results, as a text to paste into a bug report."""
    with _progress.counting("checks") as progress:
        diagnosis = doctor.diagnose(progress)
    print(diagnosis.text)
    raise typer.Exit(not diagnosis.healthy)


_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@app.command("bench")
def _bench(
    op: Annotated[str | None, typer.Option(help=f"Only this operator: {', '.join(ROOMS)}.")] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of its first argument, such as 2x64x128x128.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other size or option of the call; may be repeated."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the values: {', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    backward: Annotated[
        bool, typer.Option("--backward/--no-backward", help="Whether to time forward and backward too.")
    ] = True,
    against: Annotated[
        str | None, typer.Option(help=f"Only these, separated by commas: {', '.join(EVERYONE[1:])}.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each call.")] = 0.5,
    threads: Annotated[int | None, typer.Option(min=1, help="How many threads torch may use.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the timings: a .png, .pdf or .svg file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be timed, and stop.")] = False,
) -> None:
    """Time the operators beside the other implementations that are installed.

    Without options, a small call of each operator. With --op and --shape, a call of your own, for example

    deformkit bench --op deform_conv --shape 2x64x128x128 --set kernel_size=5

    deformkit bench --op ms_deform_attn --shape 1x5440x8x32 --set sizes=64x64,32x32,16x16,8x8 --set queries=900

    Every implementation is first compared with the reference, forward and backward; one that is wrong is not timed. The
    reference itself takes long, and is timed only if --against names it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(_DTYPES)}", param_hint="--dtype")
    if plot is not None:
        _check_picture("--plot", plot)
    _check_device(device)
    names = _chosen_names(against)
    cases = _chosen_cases(op, shape, settings or [])
    if dry_run:
        with _enough_memory():
            _print_plan(cases, names, _DTYPES[dtype], device)
        return
    warning = bench.busy()
    if warning:
        Console(stderr=True).print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)
    passes = bench.PASSES if backward else bench.PASSES[:1]
    document: dict[str, Any] = {**bench.origin(), "device": device, "dtype": dtype, "rows": []}
    with _enough_memory(), _progress.counting("timings") as progress:
        progress(0, total := len(cases) * len(passes))
        options: dict[str, Any] = {"dtype": _DTYPES[dtype], "device": device, "passes": passes, "least": 1}
        for row in bench.rows(cases, names, seconds, **options):
            document["rows"].append(row)
            progress(len(document["rows"]), total)
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        _print_results(document)
    if plot is not None:
        bench.plot(document, plot)


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Say in words that the arguments of a call, or its reference, do not fit into memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        problem = "there is not enough memory for this call and for the reference that it is compared with"
        raise typer.BadParameter(f"{problem}; a smaller one needs less", param_hint="--shape and --set") from None


def _check_picture(option: str, path: Path) -> None:
    if path.suffix not in (".png", ".pdf", ".svg") or not path.absolute().parent.is_dir():
        expected = "it must be a .png, .pdf or .svg file in a folder that exists"
        raise typer.BadParameter(f"{str(path)!r}: {expected}", param_hint=option)
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("drawing needs matplotlib; pip install 'deformkit[viz]' brings it", param_hint=option)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"{device!r}: {str(error).splitlines()[0]}", param_hint="--device") from None


def _chosen_cases(op: str | None, shape: str | None, settings: list[str]) -> list[Any]:
    if op is not None and op.rstrip("123d") in ROOMS:
        op = op.rstrip("123d")
    if op is not None and op not in ROOMS:
        raise typer.BadParameter(f"{op!r} is none of {', '.join(ROOMS)}", param_hint="--op")
    if shape is None:
        if settings:
            raise typer.BadParameter("it needs --op and --shape", param_hint="--set")
        return [case for case in bench.quick() if op in (None, operator(case))]
    if op is None:
        raise typer.BadParameter("it needs --op", param_hint="--shape")
    try:
        case = of_shape(op, _numbers(shape), dict(map(_setting, settings)))
        arguments = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in case.arguments().items()
        }
        ours(case, arguments).run()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise typer.BadParameter(str(error), param_hint="--shape and --set") from None
    return [case]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.replace(",", "x").split("x")]
    except ValueError:
        raise ValueError(f"{text!r}: it must be whole numbers, such as 2x64x128x128") from None


def _setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``: a word, a number, ``3x3`` for several, or ``64x64,32x32`` for the sizes of levels."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: it must be NAME=VALUE")
    if name == "sizes":
        return name, tuple(tuple(_numbers(size)) for size in value.split(","))
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, tuple(_numbers(value)) if value[:1].isdigit() else value


def _chosen_names(against: str | None) -> list[str]:
    if against is None:
        return bench.installed()
    names = against.split(",")
    for name in names:
        if name not in EVERYONE:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(EVERYONE[1:])}", param_hint="--against")
    return [OURS, *names]


def _print_plan(cases: list[Any], names: list[str], dtype: torch.dtype, device: str) -> None:
    console = Console()
    for case in cases:
        tensors, implementations = bench.planned(case, names, dtype, device)
        console.print(f"[bold]{operator(case)}[/bold] {case}, on {device}")
        plan = {("argument", "value", "dtype", "size"): tensors, ("implementation", "plan"): implementations}
        for head, rows in plan.items():
            table = Table(*head, box=SIMPLE)
            for row in rows:
                table.add_row(*row)
            console.print(table)


def _print_results(document: dict[str, Any]) -> None:
    console, rows = Console(), document["rows"]
    for name in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == name]
        timed = [n for n in EVERYONE if any("median" in row["rivals"].get(n, {}) for row in mine)]
        others = [n for n in timed if n != OURS]
        columns = [Column(other, justify="right") for other in (OURS, *others)]
        table = Table("case", "", *columns, box=SIMPLE, title=name, title_justify="left", title_style="bold")
        for above, row in zip([None, *mine], mine, strict=False):
            case = "" if above and above["case"] == row["case"] else row["case"]
            cells = [_ratio(other, row["rivals"]) for other in others]
            ours_took = row["rivals"][OURS].get("median")
            time = row["rivals"][OURS].get("skipped") if ours_took is None else f"{1e3 * ours_took:.2f} ms"
            table.add_row(case, row["pass"], time, *cells)
        console.print(table)
        left_out = {n: entry["skipped"] for row in mine for n, entry in row["rivals"].items() if n not in timed}
        if left_out:
            reasons = (f"{other} ({reason})" for other, reason in left_out.items())
            console.print(f"not timed: {', '.join(reasons)}", highlight=False)
    machine = document["machine"]
    console.print(
        f"{machine['processor']}, {machine['threads']} threads, torch {document['versions']['torch']}, "
        f"{document['dtype']} on {document['device']}; medians.\n"
        "2.0x: it takes twice the time of deformkit. plain, the convolution without\n"
        "deformation: deformkit takes that many times its time.",
        highlight=False,
    )


def _ratio(name: str, timed: dict[str, Any]) -> str:
    if "median" not in timed.get(name, {}) or "median" not in timed[OURS]:
        return ""
    ratio = timed[name]["median"] / timed[OURS]["median"]
    return f"{1 / ratio if name == PLAIN else ratio:.2f}x"


@app.command("demo")
def _demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many repetitions.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="How often each training image is seen.")] = 25,
    out: Annotated[Path, typer.Option(help="Where the picture goes: .png, .pdf or .svg.")] = Path("warped_digits.png"),
    steps: Annotated[int | None, typer.Option(min=1, help="How many batches, in place of epochs.")] = None,
) -> None:
    """Train a small network with deformable layers beside a plain one, and draw where it looks."""
    _check_picture("--out", out)
    demo.main(seeds, epochs, out, steps)


app.command("look")(look.look)
app.command("plan")(planning.plan)
