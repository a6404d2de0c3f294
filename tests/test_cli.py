"""The command line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import deformkit
from deformkit import __main__, cli, demo, doctor
from deformkit.ops._library import operators

run = CliRunner().invoke


def test_version() -> None:
    assert run(cli.app, ["--version"]).output.strip() == deformkit.__version__


def test_commands_are_listed() -> None:
    output = run(cli.app, ["--help"]).output
    for command in ("doctor", "bench", "demo"):
        assert command in output


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor_prints_its_report_and_fails_with_the_self_test(monkeypatch: pytest.MonkeyPatch, healthy: bool) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda progress: doctor.Diagnosis("the | report", healthy))
    result = run(cli.app, ["doctor"])
    assert result.stdout == "the | report\n"
    assert result.exit_code == (0 if healthy else 1)


def test_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = [name for name in operators if not name.endswith("_backward")]
    for name in forwards:
        cases = importlib.import_module(f"deformkit.ops.{name}.cases")
        monkeypatch.setattr(cases, "BENCHMARKS", cases.CASES)
    result = run(cli.app, ["bench", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert result.output.count("forward + backward") == 3 * len(forwards)
    for name in forwards:
        assert result.output.count(name) == 1


def test_demo_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(demo, "main", lambda *args: calls.append(args))
    assert run(cli.app, ["demo"]).exit_code == 0
    assert run(cli.app, ["demo", "--seeds", "2", "--epochs", "4", "--out", "a.svg", "--steps", "7"]).exit_code == 0
    assert calls == [(3, 25, Path("warped_digits.png"), None), (2, 4, Path("a.svg"), 7)]


def test_demo_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = run(cli.app, ["demo"])
    assert result.exit_code != 0
    assert str(result.exception) == "deformkit: the demo needs rich; pip install 'deformkit[demo]' brings it"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "deformkit.cli")
    monkeypatch.delattr(deformkit, "cli")
    monkeypatch.setattr(sys, "argv", ["deformkit", "bench"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == f"deformkit: the command line needs {missing}; pip install 'deformkit[cli]' brings it"
    monkeypatch.setattr(sys, "argv", ["deformkit", "doctor"])
    monkeypatch.setattr(doctor, "diagnose", lambda: doctor.Diagnosis("the | report", True))
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert not stop.value.code and capsys.readouterr().out == "the | report\n"


def test_module_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "deformkit", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, deformkit.__version__)
