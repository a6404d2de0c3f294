"""The example of training, whose workers are killed; as a program, a number of times at random steps."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

EXAMPLE = Path(__file__).parents[2] / "examples/train_distributed.py"
Kill = tuple[int, int, float]
"""After the report of a step, the worker of this number, and so many seconds later."""


def train(output: Path, options: dict[str, Any], kills: Sequence[Kill] = (), ranks: int = 2) -> list[str]:
    """What the training prints, each kill after the one before; its errors are written beside the folder."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "--max-restarts=3",
    ]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, *launcher, str(EXAMPLE), *flags, "--output", str(output)]
    # In the store that torchrun keeps, new workers would find the addresses of dead ones.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    waiting, lines = list(kills), []
    errors = output.with_suffix(".log")
    with (
        errors.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if waiting and line.startswith(f"step {waiting[0][0]} "):
                _, worker, seconds = waiting.pop(0)
                time.sleep(seconds)
                os.kill(workers(process.pid)[worker], signal.SIGKILL)
    assert process.returncode == 0, errors.read_text()[-4000:]
    assert not waiting, f"no line of step {waiting[0][0]} in {lines}"
    return lines


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if str(EXAMPLE) in Path(f"/proc/{child}/cmdline").read_text()]


def state(output: Path) -> dict[str, Any]:
    """The last checkpoint, whole."""
    file = output / "whole.pt"
    dcp_to_torch_save(sorted(output.glob("step_*"))[-1], file)
    result: dict[str, Any] = torch.load(file, weights_only=False)["training"]
    return result


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The names of all that is not the same, to the last bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [name]
        return [found for key in one for found in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list | tuple):
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{name}/{i}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [name]


def steps(lines: Sequence[str]) -> dict[int, str]:
    """The loss that was printed for each step, and printed last."""
    return {int(line.split()[1]): line.split("loss")[1].split()[0] for line in lines if line.startswith("step ")}


def continued(lines: Sequence[str]) -> list[tuple[int, list[int]]]:
    """For each new beginning but the first, the step after which it was, and the steps that were reported since."""
    found: list[tuple[int, list[int]]] = []
    for line in lines:
        if "ing after step " in line:
            found.append((int(line.split()[-1]), []))
        elif line.startswith("step "):
            found[-1][1].append(int(line.split()[1]))
    return found[1:]


def main(times: int) -> None:
    last = 20
    options = {"task": "segment", "steps": last, "batch": 2, "size": 16, "save_every": 3, "report_every": 1}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = train(folder / "undisturbed", options)
        truth = state(folder / "undisturbed")
        for i in range(times):
            kill = (random.randint(4, 17), random.randrange(2), random.uniform(0, 0.3))
            lines = train(folder / f"killed_{i}", options, [kill])
            wrong = differences(truth, state(folder / f"killed_{i}"))
            (begun,) = continued(lines)
            complete = begun[1] == list(range(begun[0] + 1, last + 1))
            same = steps(lines) == steps(expected)
            print(
                f"worker {kill[1]} killed {kill[2]:.2f} s after step {kill[0]}; continued after step {begun[0]}; "
                f"no step lost since: {complete}; same losses: {same}; differences in the end: {wrong or 'none'}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 10)
