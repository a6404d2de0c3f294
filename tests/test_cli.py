"""The command line."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import deformkit
from deformkit import __main__, bench, cli, demo, doctor
from deformkit._testing import rivals
from deformkit._testing.cases import ROOMS

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


OWN_SHAPES = {
    "deform_conv": ["2x4x9x8", "kernel_size=3x1", "groups=2"],
    "deform_conv1d": ["1x4x30"],
    "deform_conv_transpose": ["2x4x5x3", "groups=2"],
    "deform_correlate": ["2x7x2x4", "sizes=4x5,3x1", "points=2"],
    "deform_splat": ["2x4x5x3", "groups=2"],
    "deform_aggregate": ["1x5x6x2x4", "remove_center=true"],
    "ms_deform_attn": ["2x23x2x4", "sizes=4x5,3x1", "queries=7", "points=2"],
    "deform_roi_pool": ["1x3x9x8", "output_size=2", "rois=4"],
}


@pytest.mark.parametrize("op", OWN_SHAPES)
def test_bench_of_a_shape_of_ones_own(op: str) -> None:
    shape, *settings = OWN_SHAPES[op]
    options = ["--op", op, "--shape", shape, *(part for setting in settings for part in ("--set", setting))]
    result = run(cli.app, ["bench", *options, "--seconds", "0", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"]
    others = {"deform_aggregate": "grid_sample", "deform_correlate": "grid_sample", "deform_splat": "index_add"}
    beside = "plain" if "conv" in op else others.get(op)
    for row in rows:
        assert row["operator"] == op.rstrip("1d") and row["case"] == shape
        for name in ("deformkit", *([beside] if beside else [])):
            assert row["rivals"][name]["median"] > 0
        assert row["rivals"]["deformkit"]["error"] < 1e-5


def test_bench_of_every_operator_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for room in ROOMS.values():
        monkeypatch.setattr(room, "BENCHMARKS", room.CASES)
    options = ["--seconds", "0", "--against", "reference,plain", "--plot", str(tmp_path / "bench.png")]
    monkeypatch.setattr(bench, "load", lambda: 3.0)
    result = run(cli.app, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("forward + backward") == 3 * len(ROOMS)
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if doctor.processor() not in line)
    assert "the load of this machine is 3 on" in result.stderr
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    for name in ROOMS:
        assert result.stdout.splitlines().count(name.ljust(80).rstrip()) <= 1 and name in result.stdout


def test_plain_is_the_time_of_ours_over_its_own() -> None:
    timed = {"deformkit": {"median": 3.0}, "plain": {"median": 2.0}, "dc1d": {"median": 6.0}, "mmcv": {"skipped": ""}}
    assert [cli._ratio(name, timed) for name in ("plain", "dc1d", "mmcv")] == ["1.50x", "2.00x", ""]


def test_a_wrong_or_failing_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: object, arguments: dict[str, Any]) -> rivals.Call:
        call = rivals.ours(case, arguments)
        return rivals.Call(lambda: call.run() * 1.01, call.leaves)

    def failing(case: object, arguments: dict[str, Any]) -> rivals.Call:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(rivals.LIBRARIES["deform_roi_pool"], "torchvision", wrong)
    monkeypatch.setitem(rivals.LIBRARIES["deform_roi_pool"], "mmcv", failing)
    monkeypatch.setattr(rivals, "ABSENT", [])
    monkeypatch.setattr(bench, "ABSENT", [])
    case = ROOMS["deform_roi_pool"].CASES[0]
    (row,) = bench.rows([case], ["deformkit", "torchvision", "mmcv"], 0.0, passes=["forward"], least=1)
    assert row["rivals"]["torchvision"]["skipped"].startswith("wrong: error 0.0")
    assert row["rivals"]["mmcv"] == {"skipped": "failed: RuntimeError"}
    assert "median" in row["rivals"]["deformkit"]


@pytest.mark.parametrize("name", ["2d", "2d-v1"])
def test_mmcv_is_called_with_its_own_signature(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Functions of deformkit with the names and signatures of mmcv stand for mmcv, which few environments can build."""
    from deformkit.compat import mmcv

    monkeypatch.setitem(sys.modules, "mmcv", ModuleType("mmcv"))
    monkeypatch.setitem(sys.modules, "mmcv.ops", mmcv)
    monkeypatch.setitem(sys.modules, "mmcv.ops.multi_scale_deform_attn", mmcv)
    monkeypatch.setattr(bench, "ABSENT", [])
    (conv,) = [case for case in ROOMS["deform_conv"].CASES if case.name == name]
    (attn,) = [case for case in ROOMS["ms_deform_attn"].CASES if case.name == "2d"]
    for case in (conv, attn):
        calls, notes = bench.gated(case, ["mmcv"])
        assert list(calls) == ["mmcv"] and notes["mmcv"]["error"] < 1e-5


def test_bench_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "rows", None)
    result = run(cli.app, ["bench", "--op", "deform_conv2d", "--shape", "2x4x9x8", "--dtype", "bfloat16", "--dry-run"])
    assert result.exit_code == 0, result.output
    for part in ("2x18x9x8", "bfloat16", "is checked and timed", "1-D only"):
        assert part in result.stdout


WRONG_OPTIONS = {
    "--op": (["--op", "conv"], "'conv' is none of"),
    "--shape": (["--shape", "1x2x3"], "it needs --op"),
    "--set": (["--set", "groups=2"], "it needs --op and --shape"),
    "shape": (["--op", "deform_conv", "--shape", "1xa"], "'1xa': it must be whole numbers"),
    "axes": (["--op", "deform_conv", "--shape", "1x2"], "it must be [B, C, *S]"),
    "setting": (["--op", "deform_conv", "--shape", "1x2x9", "--set", "kernel=3"], "kernel is no setting"),
    "groups": (["--op", "deform_conv", "--shape", "1x6x9", "--set", "groups=4"], "groups is 4; it must divide"),
    "no groups": (["--op", "deform_conv", "--shape", "1x6x9", "--set", "groups=0"], "groups is 0; it must divide"),
    "empty": (["--op", "deform_sample", "--shape", "1x0x9"], "shape is [1, 0, 9]"),
    "bins": (["--op", "deform_roi_pool", "--shape", "1x4x9", "--set", "group_size=3"], "group_size is (3,)"),
    "too large": (["--op", "deform_sample", "--shape", "1x2x9", "--set", f"spread={10**20}"], "too big"),
    "sizes": (["--op", "ms_deform_attn", "--shape", "1x9x1x2", "--set", "sizes=2x2,5"], "sizes is ((2, 2), (5,))"),
    "levels": (["--op", "ms_deform_attn", "--shape", "1x9x1x2"], "sizes is None"),
    "too small": (
        ["--op", "deform_conv", "--shape", "1x2x3", "--set", "padding=0", "--set", "kernel_size=5"],
        "output",
    ),
    "--dtype": (["--dtype", "int8"], "'int8' is none of"),
    "--device": (["--device", "nowhere"], "'nowhere': "),
    "--against": (["--against", "nobody"], "'nobody' is none of"),
    "--plot": (["--plot", "a.txt"], "'a.txt': it must be a .png"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_a_wrong_option_of_bench_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, message = WRONG_OPTIONS[name]
    monkeypatch.setenv("COLUMNS", "200")
    result = run(cli.app, ["bench", *options])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_for_bench_is_no_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def rows(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(bench, "rows", rows)
    result = run(cli.app, ["bench", "--op", "deform_sample", "--shape", "1x2x9"])
    assert result.exit_code == 2 and "not enough memory for this call" in result.stderr, result.output
    error = RuntimeError("another reason")
    assert run(cli.app, ["bench", "--op", "deform_sample", "--shape", "1x2x9"]).exception is error


def test_a_wrong_picture_of_the_demo_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(cli.app, ["demo", "--out", "foo.jpg"])
    assert result.exit_code == 2
    assert "Invalid value for --out: 'foo.jpg': it must be a .png, .pdf or .svg file" in result.stderr


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
def test_a_missing_extra_is_one_line(
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
