"""Training on several processes: batches, parameters, heads or volumes are divided among them.

    torchrun --nproc-per-node 2 train_distributed.py --strategy fsdp

The networks are the detector of ``detection_2d.py`` and a segmentation network for volumes. On a machine with GPUs each
process takes one; without, they compute on CPUs. Run again with the same ``--output``, the program continues after its
last checkpoint, and so do all workers if one of them dies and torchrun was given ``--max-restarts``.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.util import find_spec
from math import cos, pi
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import deformkit as dk
from deformkit.distributed import parallel_plan, spatial_deform_conv

CLASSES = ("other", "grey matter", "white matter")


class Task(str, Enum):
    detect = "detect"
    segment = "segment"


class Strategy(str, Enum):
    ddp = "ddp"
    fsdp = "fsdp"
    tensor = "tensor"
    spatial = "spatial"


class Precision(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


# Tasks. Each has a number of samples, makes its network, and computes the sum of the losses of a share of a batch and
# the number of terms in it. Only sums of all ranks are divided, so that results do not depend on the number of ranks.


class Detection:
    """Digits that are scattered over canvases."""

    def __init__(self, dtype: torch.dtype, samples: int = 144) -> None:
        from detection_2d import Scenes, digits, scenes

        found = scenes(digits()[0], samples)
        self.scenes = Scenes(found.images.to(dtype), found.boxes.to(dtype), found.labels)
        self.samples = samples

    def model(self) -> nn.Module:
        from detection_2d import Detector

        return without_batch_statistics(Detector())

    def batch(self, indices: Tensor) -> list[Tensor]:
        images = self.scenes.images[indices]
        noise = 0.05 * torch.randn(images.shape, dtype=images.dtype)
        return [images + noise, self.scenes.boxes[indices], self.scenes.labels[indices]]

    def loss(self, model: nn.Module, images: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from detection_2d import Scenes, set_loss

        truth = Scenes(images, boxes, labels)
        count = truth.present.sum()
        stages = [(logits.to(boxes.dtype), found.to(boxes.dtype)) for logits, found in model(images)]
        return sum(set_loss(*stage, truth) for stage in stages) * count.clamp(min=1), count


class Segmentation:
    """Patches of the MNI152 template, which ships with nilearn, in voxels of 3 mm."""

    samples = 144

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        import nibabel

        nilearn = find_spec("nilearn")
        if nilearn is None or nilearn.origin is None:
            raise SystemExit("--task segment needs nilearn; pip install 'deformkit[gallery]' brings it")
        folder = Path(nilearn.origin).parent / "datasets/data"
        images = {}
        for name in ("t1", "gm", "wm"):
            (file,) = folder.glob(f"mni_icbm152_{name}_tal_nlin_sym_*.nii.gz")
            image = torch.from_numpy(nibabel.load(file).get_fdata(dtype="float32"))
            images[name] = F.avg_pool3d(image[None, None], 3)[0, 0]
        white, grey = (images[name] > images[name].max() / 2 for name in ("wm", "gm"))
        brain = images["t1"]
        self.brain = ((brain - brain.mean()) / brain.std()).to(dtype)
        self.labels = torch.where(white, 2, torch.where(grey, 1, 0))
        if not 4 <= size <= min(brain.shape):
            raise SystemExit(f"--size is {size}; it must be from 4 to {min(brain.shape)}")
        self.size = size
        # Where each patch begins.
        ends = torch.tensor(brain.shape) - size + 1
        self.corners = (torch.rand(self.samples, 3) * ends).long().tolist()

    def model(self) -> nn.Module:
        return Segmenter()

    def batch(self, indices: Tensor) -> list[Tensor]:
        places = [tuple(slice(n, n + self.size) for n in self.corners[i]) for i in indices.tolist()]
        volumes = torch.stack([self.brain[place] for place in places]).unsqueeze(1)
        noise = 0.25 * torch.randn(volumes.shape, dtype=volumes.dtype)
        return [volumes + noise, torch.stack([self.labels[place] for place in places])]

    def loss(self, model: nn.Module, volumes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(volumes).to(volumes.dtype)
        return F.cross_entropy(logits, labels, reduction="sum"), torch.tensor(labels.numel())


def without_batch_statistics(model: nn.Module) -> nn.Module:
    """Group normalisation in place of batch normalisation, whose statistics depend on how a batch is divided."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
    return model


class ChannelNorm(nn.LayerNorm):
    """Normalises the channels of each voxel, for which no other voxel is needed."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Segmenter(nn.Module):
    """A U-Net of two levels, whose coarse one is deformable. Volumes ``[B, 1, D, H, W]`` to logits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv3d(1, width, 3, padding=1), ChannelNorm(width), nn.ReLU())
        self.coarse = nn.Sequential(
            nn.Conv3d(width, 2 * width, 3, padding=1),
            ChannelNorm(2 * width),
            nn.ReLU(),
            dk.nn.PackedDeformConv3d(2 * width, 2 * width, 3, padding=1),
            ChannelNorm(2 * width),
            nn.ReLU(),
        )
        self.fine_up = nn.Sequential(nn.Conv3d(3 * width, width, 3, padding=1), ChannelNorm(width), nn.ReLU())
        self.head = nn.Conv3d(width, len(CLASSES), 1)

    def forward(self, volumes: Tensor) -> Tensor:
        fine = self.fine(volumes)
        coarse = self.coarse(F.avg_pool3d(fine, 2))
        return self.head(self.fine_up(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1)))


def planned_detector(batch: int) -> tuple[nn.Module, tuple[Tensor]]:
    """For ``deformkit plan``."""
    from detection_2d import Detector

    return without_batch_statistics(Detector()), (torch.empty(batch, 1, 64, 64),)


def planned_segmenter(batch: int) -> tuple[nn.Module, tuple[Tensor]]:
    """For ``deformkit plan``."""
    return Segmenter(), (torch.empty(batch, 1, 32, 32, 32),)


# Strategies


def divided(model: nn.Module, strategy: Strategy, mesh: DeviceMesh, precision: Precision) -> nn.Module:
    """The network whose parameters, heads or volumes are divided among the ranks of a mesh."""
    if strategy is Strategy.ddp:
        return DistributedDataParallel(model)
    if strategy is Strategy.fsdp:
        # Outputs of the heads are views of matrix products. Nothing changes them in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        policy = MixedPrecisionPolicy()
        if precision is Precision.bfloat16:
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for part in model.children():
            for layer in part if isinstance(part, nn.ModuleList) else ():
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    if strategy is Strategy.tensor:
        return parallelize_module(model, mesh, parallel_plan(model))
    return by_rows(model, mesh)


def by_rows(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Let every rank compute some rows of volumes, with what its convolutions need of the rows of others."""
    for layer in model.modules():
        if isinstance(layer, dk.nn.PackedDeformConv3d):
            layer.forward = partial(deformed_rows, layer, mesh)
        else:
            if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] > 1:
                layer.forward = partial(convolved_rows, layer, mesh.get_group())
            # Each rank computes a summand of these gradients; of the others, spatial_deform_conv returns the sum.
            for parameter in layer.parameters(recurse=False):
                parameter.register_hook(partial(summed, mesh.get_group()))
    return model


def summed(group: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=group)
    return gradient


def deformed_rows(layer: dk.nn.PackedDeformConv3d, mesh: DeviceMesh, rows: Tensor) -> Tensor:
    offset, _ = layer.predict(rows)
    parts = [DTensor.from_local(part, mesh, [Shard(2)], run_check=False) for part in (rows, offset)]
    steps = (layer.stride, layer.padding, layer.dilation)
    return spatial_deform_conv(*parts, layer.weight, layer.bias, *steps, boundary=layer.boundary).to_local()


def convolved_rows(layer: nn.Conv3d, group: dist.ProcessGroup, rows: Tensor) -> Tensor:
    halo, *padding = layer.padding
    before, after = Neighbours.apply(rows[:, :, :halo].contiguous(), rows[:, :, -halo:].contiguous(), group)
    return F.conv3d(torch.cat([before, rows, after], 2), layer.weight, layer.bias, padding=(0, *padding))


class Neighbours(torch.autograd.Function):
    """Exchanges first rows with the rank before and last ones with the rank after; zeros where there is none."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, last: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        rank, received, transfers = dist.get_rank(group), [], []
        for sent, other in ((first, rank - 1), (last, rank + 1)):
            received.append(torch.zeros_like(sent))
            if 0 <= other < dist.get_world_size(group):
                transfers.append(dist.P2POp(dist.isend, sent, group=group, group_peer=other))
                transfers.append(dist.P2POp(dist.irecv, received[-1], group=group, group_peer=other))
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        return received[0], received[1]

    @staticmethod
    def backward(ctx: Any, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, None]:
        return *Neighbours.apply(before.contiguous(), after.contiguous(), ctx.group), None


def share(batch: Sequence[Tensor], strategy: Strategy, mesh: DeviceMesh) -> list[Tensor]:
    """This rank's part of a batch: the whole of it, some samples, or some rows of every volume."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if strategy is Strategy.tensor:
        return list(batch)
    if strategy is Strategy.spatial:
        return [part.chunk(ranks, part.dim() - 3)[rank] for part in batch]
    return [part.tensor_split(ranks)[rank] for part in batch]


def check(task: Task, strategy: Strategy, batch: int, size: int, samples: int, ranks: int) -> None:
    if strategy is Strategy.spatial and task is not Task.segment:
        raise SystemExit("--strategy spatial divides volumes; it needs --task segment")
    if strategy is Strategy.spatial and size % (2 * ranks):
        raise SystemExit(f"--size is {size}; it must be a multiple of {2 * ranks}, two rows for each rank")
    if strategy in (Strategy.ddp, Strategy.fsdp) and batch < ranks:
        raise SystemExit(f"--batch is {batch}; each of {ranks} ranks needs a sample")
    if samples % batch:
        raise SystemExit(f"--batch is {batch}; it must divide the {samples} samples")


# Training


@dataclass
class Training:
    """All that a run needs to continue as if it had not been interrupted: the state of a checkpoint.

    Every rank draws the random numbers of whole batches, so that their state is the same on each.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: Tensor
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        random = {"cpu": torch.get_rng_state()}
        return {"model": model, "optimizer": optimizer, "order": self.order, "step": self.step, "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.order, self.step = state["order"], state["step"]
        torch.set_rng_state(state["random"]["cpu"])

    def next_indices(self, batch: int) -> Tensor:
        """The samples of the next batch, in an order that is drawn anew when all have been seen."""
        start = self.step * batch % len(self.order)
        if start == 0:
            self.order = torch.randperm(len(self.order))
        return self.order[start : start + batch]


class Checkpoints:
    """Sharded checkpoints, written while training goes on. One is complete when it has its file ``.metadata``."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.folder, self.training = folder, training
        # The thread that writes must not share a group with the collectives of training.
        self.group = dist.new_group(backend="gloo")
        self.writing: Any = None

    def load(self) -> None:
        """Continue after the last complete checkpoint, if there is one."""
        complete = sorted(path.parent.name for path in self.folder.glob("step_*/.metadata"))
        last = [complete[-1] if complete else None]
        dist.broadcast_object_list(last, 0, group=self.group)
        if dist.get_rank() == 0:
            for path in self.folder.glob("step_*"):
                if path.name not in complete[-2:]:
                    shutil.rmtree(path)
        dist.barrier(self.group)
        if last[0] is None:
            say("no checkpoint: starting after step 0")
        else:
            dcp.load({"training": self.training}, checkpoint_id=self.folder / last[0], process_group=self.group)
            say(f"continuing after step {self.training.step}")

    def save(self) -> None:
        self.wait()
        folder = self.folder / f"step_{self.training.step:08d}"
        self.writing = dcp.async_save({"training": self.training}, checkpoint_id=folder, process_group=self.group)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and remove all but the last two."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None
            if dist.get_rank() == 0:
                for path in sorted(self.folder.glob("step_*"))[:-2]:
                    shutil.rmtree(path)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def take_step(training: Training, loss: Callable[..., Any], part: list[Tensor], strategy: Strategy) -> float:
    """One step of the optimizer; the result is the mean loss of the whole batch."""
    total, count = loss(training.model, *part)
    sums = torch.stack([total.detach(), count.to(total)])
    if strategy is not Strategy.tensor:
        dist.all_reduce(sums)
    training.optimizer.zero_grad()
    # DDP and FSDP average the gradients of all ranks.
    averaged = dist.get_world_size() if strategy in (Strategy.ddp, Strategy.fsdp) else 1
    (total * averaged / sums[1].clamp(min=1)).backward()
    clip(list(training.model.parameters()), 1.0)
    training.optimizer.step()
    training.step += 1
    return (sums[0] / sums[1].clamp(min=1)).item()


def clip(parameters: list[nn.Parameter], largest: float) -> None:
    """:func:`torch.nn.utils.clip_grad_norm_`, also where only some of the parameters are divided."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) is kind] for kind in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds if kind]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest, norm)


def optimizer_for(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW, with a tenth of the learning rate for offsets; divided and whole parameters in groups of their own."""
    groups = [
        {**group, "params": chosen}
        for group in dk.param_groups(model, rate, 0.1)
        for kind in (False, True)
        if (chosen := [p for p in group["params"] if isinstance(p, DTensor) is kind])
    ]
    for group in groups:
        group["base"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=1e-4)


def main(
    task: Annotated[Task, typer.Option(help="Digits in images, or tissues in volumes.")] = Task.detect,
    strategy: Annotated[
        Strategy,
        typer.Option(help="What is divided: batches, parameters too (FSDP2), heads and channels, or volumes."),
    ] = Strategy.ddp,
    precision: Annotated[Precision, typer.Option(help="Of the computation.")] = Precision.float32,
    steps: Annotated[int, typer.Option(min=1, help="How many batches.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch, on all ranks together.")] = 16,
    size: Annotated[int, typer.Option(help="The side of a patch of the volume, in voxels.")] = 32,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights, data order and noise.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 20,
    report_every: Annotated[int, typer.Option(min=1, help="Steps between two lines of progress.")] = 10,
    output: Annotated[Path, typer.Option(help="The folder of checkpoints and records.")] = Path("trained"),
) -> dict[int, float]:
    """Train a network on all processes that torchrun starts, or on this one alone."""
    begins = not dist.is_initialized()
    if begins:
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **alone)
    try:
        return train(task, strategy, precision, steps, batch, size, rate, seed, save_every, report_every, output)
    finally:
        if begins:
            dist.destroy_process_group()


def train(
    task: Task,
    strategy: Strategy,
    precision: Precision,
    steps: int,
    batch: int,
    size: int,
    rate: float,
    seed: int,
    save_every: int,
    report_every: int,
    output: Path,
) -> dict[int, float]:
    """The loss of each step. The arguments are those of the command line."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    # Every rank makes the same data and the same weights.
    torch.manual_seed(seed)
    dtype = torch.float64 if precision is Precision.float64 else torch.float32
    data = Detection(dtype) if task is Task.detect else Segmentation(dtype, size)
    check(task, strategy, batch, size, data.samples, mesh.size())
    model = divided(data.model().to(device, dtype), strategy, mesh, precision)
    training = Training(model, optimizer_for(model, rate), torch.arange(data.samples))
    checkpoints = Checkpoints(output, training)
    checkpoints.load()

    half = torch.autocast(device.type, torch.bfloat16) if precision is Precision.bfloat16 else nullcontext()
    losses: dict[int, float] = {}
    record, start = recorder(output / "tensorboard", training.step), time.perf_counter()
    for step in range(training.step, steps):
        for group in training.optimizer.param_groups:
            group["lr"] = group["base"] * min(1, (step + 1) / 20) * (1 + cos(pi * step / steps)) / 2
        whole = data.batch(training.next_indices(batch))
        part = [tensor.to(device) for tensor in share(whole, strategy, mesh)]
        with half:
            losses[training.step] = loss = take_step(training, data.loss, part, strategy)
        record(loss, training.step)
        if training.step % report_every == 0 or training.step == steps:
            say(f"step {training.step} of {steps}  loss {loss:.4f}  {time.perf_counter() - start:.1f} s")
        if training.step % save_every == 0 or training.step == steps:
            checkpoints.save()
    checkpoints.wait()
    say(f"checkpoints: {output}")
    return losses


def recorder(folder: Path, step: int) -> Callable[[float, int], None]:
    """A function that writes a loss for TensorBoard, if this is the first rank and TensorBoard is installed."""
    if dist.get_rank() or find_spec("tensorboard") is None:
        return lambda loss, step: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=5)
    return lambda loss, step: writer.add_scalar("loss", loss, step)


if __name__ == "__main__":
    typer.run(main)
