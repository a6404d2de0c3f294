"""Long commands show their progress also where there is no terminal."""

import io
from itertools import count

import pytest

pytest.importorskip("rich")

from rich.console import Console

from deformkit import _progress


@pytest.fixture(autouse=True)
def _a_second_passes_between_two_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count()
    monkeypatch.setattr(_progress.time, "monotonic", lambda: float(next(seconds)))


def test_a_training_prints_a_line_every_few_seconds_into_a_pipe() -> None:
    pipe = io.StringIO()
    with _progress.training(Console(file=pipe)) as begin:
        step = begin("plain", 20)
        for done in range(20):
            step(1 / (done + 1))
    lines = pipe.getvalue().splitlines()
    assert lines[0] == "plain: 3 of 20 steps, loss 0.333"
    assert 3 <= len(lines) <= 7
    assert lines[-1].startswith("plain: 20 of 20 steps, loss 0.050, ")


def test_a_training_is_shown_in_place_on_a_terminal() -> None:
    terminal = io.StringIO()
    with _progress.training(Console(file=terminal, force_terminal=True, width=100)) as begin:
        step = begin("plain", 2)
        step(0.5)
        step(0.25)
    assert "2/2" in terminal.getvalue() and "loss 0.250" in terminal.getvalue()


def test_checks_are_counted_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.counting("checks") as progress:
        for done in range(10):
            progress(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.endswith(" of 10 checks") for line in lines)
    assert len(lines) < 10
