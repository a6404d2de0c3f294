"""The progress of long commands: in place on a terminal, and a line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 4.0

Trained = Callable[[float], None]


@contextmanager
def counting(noun: str) -> Iterator[Callable[[int, int], None]]:
    """Report on standard error. The result is called with the number of things that are done, and of all."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(noun) as status:
            yield lambda done, total: status.update(f"{done} of {total} {noun}")
    else:
        say = _now_and_then(console)
        yield lambda done, total: say(f"{done} of {total} {noun}")


@contextmanager
def training(console: Console) -> Iterator[Callable[[str, int], Trained]]:
    """Report to ``console``. The result begins a training of a name and a number of steps.

    It returns a function to call after each step with the loss.
    """
    if not console.is_terminal:
        say = _now_and_then(console)
        yield lambda name, steps: _in_lines(console, say, name, steps)
        return
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    columns = (TextColumn("{task.description:<19}"), BarColumn(), MofNCompleteColumn(), loss)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield lambda name, steps: _in_place(progress, name, steps)


def _in_place(progress: Progress, name: str, steps: int) -> Trained:
    task = progress.add_task(name, total=steps, loss=float("nan"))
    return lambda loss: progress.update(task, advance=1, loss=loss)


def _in_lines(console: Console, say: Callable[[str], None], name: str, steps: int) -> Trained:
    done, start = 0, time.monotonic()

    def step(loss: float) -> None:
        nonlocal done
        done += 1
        text = f"{name}: {done} of {steps} steps, loss {loss:.3f}"
        if done == steps:
            console.print(f"{text}, {time.monotonic() - start:.1f} s", highlight=False)
        else:
            say(text)

    return step


def _now_and_then(console: Console) -> Callable[[str], None]:
    """A function that prints a text, unless it has printed one in the last seconds."""
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(text, highlight=False)

    return say
