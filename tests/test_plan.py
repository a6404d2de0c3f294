"""``deformkit plan``: operations and bytes against sums by hand, and the command."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer")

from typer.testing import CliRunner

import deformkit as dk
from deformkit import cli
from deformkit.plan.hardware import HARDWARE
from deformkit.plan.operators import traced
from deformkit.plan.strategies import Setting, planned

ROOT = Path(__file__).parents[1]


def documented(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["plan", *options, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_operations_and_bytes_of_an_operator() -> None:
    layer = dk.nn.PackedDeformConv2d(4, 6, 3, padding=1, bias=False, device="meta")
    step = traced(layer, (torch.empty(2, 4, 7, 5, device="meta", requires_grad=True),))
    forward, backward = (step.operators[f"deform_conv{end}"] for end in ("", "_backward"))
    positions, taps = 2 * 7 * 5, 9
    assert forward.matrix == 2 * positions * taps * 4 * 6 and backward.matrix == 2 * forward.matrix
    # Each sample is a sum over four corners.
    assert forward.vector == 2 * 4 * positions * taps * 4 and backward.vector == 3 * forward.vector
    assert forward.bytes == 4 * (positions * 4 + positions * taps * 2 + 4 * 6 * taps + positions * 6)
    assert forward.calls == backward.calls == 1


@pytest.mark.parametrize("name", ["deformable-detr", "internimage", "unet3d"])
def test_models_are_planned_without_memory(name: str) -> None:
    found = documented("--model", name, "--gpus", "2048", "--batch", "1", "--dtype", "bfloat16")
    plans = {plan["strategy"]: plan for plan in found["strategies"]}
    assert found["predicted"] and any("deform" in operator for operator in found["operators"])
    sent = sum(one["sent"] for one in plans["ddp"]["collectives"])
    assert sent == pytest.approx(2 * 4 * found["parameters"], rel=1e-3)
    of_rank = {name: sum(plan["memory"].values()) for name, plan in plans.items()}
    assert of_rank["fsdp"] < of_rank["ddp"]
    assert plans["ddp"]["seconds"] >= max(plans["ddp"]["compute"], plans["ddp"]["communication"])


def test_one_gpu_sends_nothing() -> None:
    for plan in documented("--gpus", "1")["strategies"]:
        assert plan["collectives"] == [] and plan["communication"] == 0


def test_parameters_that_the_ranks_do_not_divide_are_filled_up() -> None:
    model = nn.Linear(3, 5, bias=False, device="meta")
    step = traced(model, (torch.empty(1, 3, device="meta"),))
    gathered, scattered = planned(Setting(model, step, 4, 1, False, 0.0, HARDWARE["a100"]), "fsdp").collectives
    assert (gathered.bytes, scattered.bytes) == (4 * 8 * 3, 4 * 8 * 3)
    assert gathered.sent == 4 * 8 * 3 * 3 / 4


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef small(batch): return torch.nn.Linear(3, 2), (torch.empty(batch, 3),)\n")
    assert documented("--model", f"{file}:small")["parameters"] == 8


WRONG = {
    "--model": (["--model", "nothing"], "'nothing' is none of"),
    "file": (["--model", "none.py:small"], "there is no file none.py"),
    "module": (["--model", "no_such_module:small"], "No module named"),
    "function": (["--model", "math:none"], "there is no function 'none'"),
    "--hardware": (["--hardware", "abacus"], "'abacus' is none of"),
    "--dtype": (["--dtype", "int8"], "'int8' is none of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, message = WRONG[name]
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(cli.app, ["plan", *options])
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_the_commands_of_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT / "examples")
    page = (ROOT / "docs/train_distributed.md").read_text()
    commands = re.findall(r"^deformkit (plan .*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        result = CliRunner().invoke(cli.app, shlex.split(command))
        assert result.exit_code == 0 and "Predicted, not measured" in result.stdout, result.output
