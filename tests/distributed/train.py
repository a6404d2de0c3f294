"""Under torchrun: the example of training, once with each strategy that these ranks can follow."""

import json
import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "examples/train_distributed.py"
# 6 samples are divided unevenly among 4 ranks.
COMMON = {"steps": 3, "batch": 6, "save_every": 2, "report_every": 1}
RUNS = {
    "detect": ("ddp", "fsdp", "tensor"),
    "segment": ("ddp", "fsdp", "tensor", "spatial"),
}


def runs(ranks: int) -> list[tuple[str, str]]:
    """Pairs of task and strategy; on one rank the strategies are the same."""
    return [(task, strategy) for task, found in RUNS.items() for strategy in (found if ranks > 1 else ("ddp",))]


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(EXAMPLE.parent))
    example = runpy.run_path(str(EXAMPLE))
    found = {}
    dist.init_process_group("gloo")
    for task, strategy in runs(dist.get_world_size()):
        losses = example["main"](
            task=example["Task"](task),
            strategy=example["Strategy"](strategy),
            precision=example["Precision"].float64,
            size=16,
            output=folder / f"{task}_{strategy}_{dist.get_world_size()}",
            **COMMON,
        )
        found[f"{task} {strategy}"] = list(losses.values())
    if dist.get_rank() == 0:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
