"""Runs a function on several processes that talk to each other, and returns what the first of them found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed


def report(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run checks on every rank of a script, and write what is wrong with each; nothing if it passes."""
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = ""
        except Exception as error:  # every rank fails alike, and the others go on
            found[name] = f"{type(error).__name__}: {error}"
    if torch.distributed.get_rank() == 0:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))


def on_ranks(count: int, script: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Run ``script`` with torchrun on ``count`` processes; return what its first rank writes to ``$FOUND`` as JSON."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    found = folder / f"found_{count}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "FOUND": str(found), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, *launcher, str(script), *options], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result: dict[str, Any] = json.loads(found.read_text())
    return result
