"""The command line: ``deformkit doctor | bench | demo | look``."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import __version__, bench, demo, doctor, look

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
    """Print what runs here and test it, as a block to paste into a bug report."""
    diagnosis = doctor.diagnose()
    print(diagnosis.text)
    raise typer.Exit(not diagnosis.healthy)


@app.command("bench")
def _bench(
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each call.")] = 0.5,
    threads: Annotated[int | None, typer.Option(min=1, help="How many threads torch may use.")] = None,
) -> None:
    """Time a few calls of each operator against its reference and, of convolution, the one that does not deform.

    benchmarks/run.py in the repository is the full benchmark.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    table = Table("case", "", "time", "reference", "plain")
    for column in table.columns[2:]:
        column.justify = "right"
    with console.status("timing") as status:
        above = None
        for operator, case, what, timings in bench.quick(seconds):
            status.update(f"timed {operator} {case}")
            if operator != above:
                table.add_section()
                table.add_row(f"[bold]{operator}[/bold]")
                above = operator
            ours = timings["deformkit"].median
            ratios = [
                f"{timings[name].median / ours:.2f}x" if name in timings else "" for name in ("reference", "plain")
            ]
            table.add_row(f"  {case.name}", what, f"{1e3 * ours:.2f} ms", *ratios)
    console.print(table)
    console.print(f"{doctor.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians.")
    console.print("reference, plain: the time of the reference, and of the plain counterpart, over ours.")


@app.command("demo")
def _demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many repetitions.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="How often each training image is seen.")] = 25,
    out: Annotated[Path, typer.Option(help="Where the picture goes: .png, .pdf or .svg.")] = Path("warped_digits.png"),
    steps: Annotated[int | None, typer.Option(min=1, help="How many batches, in place of epochs.")] = None,
) -> None:
    """Train a small network with deformable layers beside a plain one, and draw where it looks."""
    demo.main(seeds, epochs, out, steps)


app.command("look")(look.look)
