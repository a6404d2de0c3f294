"""Runs a script on several processes that talk to each other, and returns what the first of them found.

By hand: ``FOUND=found.json python tests/ranks.py 2 tests/distributed/rules.py``.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist


def report(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run checks on every rank of a script, and write what is wrong with each; nothing if it passes."""
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = ""
        except Exception as error:  # every rank fails alike, and the others go on
            found[name] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))


def on_ranks(count: int, script: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Run ``script`` on ``count`` processes that use gloo; return what the first rank writes to ``$FOUND`` as JSON."""
    import pytest

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    found = folder / f"found_{count}.json"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "FOUND": str(found), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(count), str(script), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def run_rank(rank: int, count: int, store: str, script: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    runpy.run_path(script, run_name="__main__")
    dist.destroy_process_group()


def main(count: int, script: str) -> None:
    from torch.multiprocessing import start_processes

    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(script).parent))
    method = "spawn"
    if sys.platform == "linux":
        # What is imported before a fork is imported once for all ranks, also what DTensor imports in its first call.
        import_module("torch._dynamo")
        runpy.run_path(script)
        method = "fork"
    with tempfile.TemporaryDirectory() as folder:
        start_processes(run_rank, (count, f"{folder}/store", script), count, start_method=method)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
