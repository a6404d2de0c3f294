"""On several processes: the example of training with several strategies, and what it communicates beside its plan."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from limits import address_space
from traffic import Traffic

from deformkit.plan.hardware import HARDWARE
from deformkit.plan.operators import traced
from deformkit.plan.strategies import Setting, planned

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_distributed as example

# 6 samples are divided unevenly among 4 ranks.
COMMON: dict[str, Any] = {"steps": 2, "batch": 6, "size": 16, "save_every": 2, "report_every": 1}
STRATEGIES = {
    1: {"detect": ("ddp",), "segment": ("ddp",)},
    2: {"detect": ("tensor",), "segment": ("tensor", "spatial")},
    4: {"detect": ("ddp", "fsdp")},
}
# Runs that others are compared with.
UNDISTURBED: dict[str, Any] = {
    "task": "segment",
    "steps": 8,
    "batch": 2,
    "size": 16,
    "save_every": 2,
    "report_every": 1,
}
LARGE: dict[str, Any] = {"task": "segment", "steps": 1, "batch": 4, "size": 60}
MEGABYTES = 500


def run(output: Path, task: str = "detect", strategy: str = "ddp", precision: str = "float32", **options: Any) -> Any:
    choices = (example.Task(task), example.Strategy(strategy), example.Precision(precision))
    return example.main(*choices, output=output, **options)


@cache
def traced_once(task: str) -> tuple[Any, Any]:
    """The network of a task and a training step of it."""
    data = example.Detection(torch.float64) if task == "detect" else example.Segmentation(torch.float64, COMMON["size"])
    model = data.model().double()
    return model, traced(model, data.batch(torch.arange(COMMON["batch"]))[:1])


def predicted(task: str, strategy: str) -> dict[str, int]:
    """The bytes of each kind of collective, of the network and the batch of a run in float64."""
    setting = Setting(*traced_once(task), dist.get_world_size(), COMMON["batch"], False, 0.5, HARDWARE["h100"])
    return {one.kind: int(one.bytes) for one in planned(setting, strategy).collectives}


def main() -> None:
    folder = Path(sys.argv[1])
    ranks, found = dist.get_world_size(), {}
    step = example.take_step
    counted: dict[str, int] = {}

    def counting(*args: Any) -> Any:
        with Traffic() as traffic:
            loss = step(*args)
        counted.clear()
        counted.update({kind: sent.bytes for kind, sent in traffic.sent.items()})
        return loss

    example.take_step = counting
    for task, strategies in STRATEGIES[ranks].items():
        for strategy in strategies:
            losses = run(folder / f"{task}_{strategy}_{ranks}", task, strategy, "float64", **COMMON)
            everyones: list[Any] = [None] * ranks
            dist.all_gather_object(everyones, dict(counted))
            busiest = max(everyones, key=lambda sent: sum(sent.values()))
            if dist.get_rank() == 0:
                found[f"{task} {strategy}"] = [list(losses.values()), busiest, predicted(task, strategy)]
    example.take_step = step
    if ranks == 2:
        run(folder / "undisturbed", **UNDISTURBED)
        with address_space(MEGABYTES):
            run(folder / "large", strategy="spatial", **LARGE)
    if dist.get_rank() == 0:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
