"""
Scattered digits, found with deformable attention (2-D)
=======================================================

A small Deformable DETR finds scanned digits that are scattered over a canvas. A few convolutions make a pyramid of
three levels. In the encoder, every pixel of the pyramid samples some points of all levels; the pixels with the highest
scores propose boxes. In the decoder, each proposal samples points in and around its box, and corrects box and class,
layer by layer.

The detector is trained twice. In the deformable one, queries predict where to sample. In the plain one, points stay
where the initialisation of :class:`deformkit.nn.MSDeformAttn` puts them, and only their weights are learned.

Two pictures are written. ``detected_digits.png`` shows held-out digits: true boxes are dotted, found ones solid, and
dots of the same colour are the samples of the last decoder layer for that box, larger where the attention weight is.
``detection_loss.png`` shows the loss and the average precision on held-out digits.

``python detection_2d.py --steps 2500`` trains longer.
"""

import argparse
import time
from dataclasses import dataclass
from math import cos, log, pi
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from deformkit.nn import MSDeformAttn

# %%
# The data
# --------
#
# Digits are drawn at random places and in random sizes, among strokes that are not digits.

CANVAS = 64
CLASSES = 10
MOST_DIGITS = 8
BATCH = 16
WIDTH = 64
HEADS = 4
QUERIES = 20
LEARNING_RATE = 1e-3
SURE = 0.5


@dataclass
class Scenes:
    """Canvases with what is on them; boxes are (centre x, centre y, width, height), in 0 .. 1."""

    images: Tensor  # [B, 1, CANVAS, CANVAS]
    boxes: Tensor  # [B, MOST_DIGITS, 4]
    labels: Tensor  # [B, MOST_DIGITS], -1 where there is no digit

    @property
    def present(self) -> Tensor:
        return self.labels >= 0


@dataclass
class Digits:
    """Images of single digits ``[D, 1, 32, 32]``, and the box of the ink in each."""

    images: Tensor
    boxes: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """Scanned digits: two thirds to train with, one third held out."""
    scans, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(scans).float().reshape(-1, 1, 8, 8) / 16
    ink = images[:, 0] > 0.2
    edges = []
    for dim in (1, 2):
        along = ink.any(dim).int()
        edges.append((along.argmax(1) / 8, 1 - along.flip(1).argmax(1) / 8))
    (left, right), (top, bottom) = edges
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1)
    images = F.interpolate(images, scale_factor=4, mode="bicubic").clamp(0, 1)
    order = torch.randperm(len(images))
    cut = len(order) * 2 // 3
    return tuple(Digits(images[i], boxes[i], torch.from_numpy(labels)[i]) for i in (order[:cut], order[cut:]))


def scenes(source: Digits, count: int) -> Scenes:
    """Digits at random places and in random sizes that hardly overlap, among random strokes and noise."""
    chosen = torch.randint(len(source.labels), (count, MOST_DIGITS))
    ink = source.boxes[chosen]
    scale = (9 + 19 * torch.rand(count, MOST_DIGITS, 1)) / CANVAS
    size = scale * ink[..., 2:]
    boxes = torch.cat([size / 2 + (1 - size) * torch.rand_like(size), size], -1)
    free = torch.zeros(count, MOST_DIGITS, dtype=torch.bool)
    for i in range(MOST_DIGITS):
        overlap = overlaps(boxes[:, i : i + 1], boxes)[0].masked_fill(~free, 0)
        free[:, i] = overlap.amax(1) < 0.02

    # Each digit is drawn on a canvas of its own: the box on the canvas reads the box of the ink.
    ratio = 1 / scale.expand(-1, -1, 2)
    shift = (2 * ink[..., :2] - 1) - (2 * boxes[..., :2] - 1) * ratio
    matrix = torch.cat([torch.diag_embed(ratio), shift.unsqueeze(-1)], -1).flatten(0, 1)
    grid = F.affine_grid(matrix, [count * MOST_DIGITS, 1, CANVAS, CANVAS], align_corners=False)
    drawn = F.grid_sample(source.images[chosen.flatten()], grid, align_corners=False)
    drawn = drawn.unflatten(0, (count, MOST_DIGITS)) * (0.5 + 0.5 * torch.rand(count, MOST_DIGITS, 1, 1, 1))
    drawn = torch.where(free[:, :, None, None, None], drawn, 0).amax(1)
    images = torch.maximum(drawn, strokes(count)) + 0.1 * torch.randn(count, 1, CANVAS, CANVAS)
    return Scenes(images, boxes, source.labels[chosen].masked_fill(~free, -1))


def strokes(count: int, each: int = 4) -> Tensor:
    """Short lines that are not digits ``[B, 1, CANVAS, CANVAS]``."""
    line = torch.arange(CANVAS).float()
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    start = CANVAS * torch.rand(count, each, 1, 1, 2)
    along = 16 * torch.rand(count, each, 1, 1, 2) - 8
    away = pixels - start
    nearest = ((away * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True)).clamp(0, 1)
    distance = (away - nearest * along).norm(dim=-1)
    return 0.8 * (1.5 - distance).clamp(0, 1).amax(1, keepdim=True)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes, and its generalisation that is negative between boxes far apart."""
    low_a, high_a = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    low_b, high_b = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    common = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    iou = common / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


# %%
# The network
# -----------


class FeedForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))


class EncoderLayer(nn.Module):
    """Every pixel of the pyramid reads the pyramid around itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(WIDTH, n_levels=3, n_heads=HEADS, n_points=4)
        self.feed_forward = FeedForward()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, memory: Tensor, position: Tensor, centres: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        memory = self.norms[0](memory + self.attention(memory + position, centres, memory, shapes))
        return self.norms[1](memory + self.feed_forward(memory))


class DecoderLayer(nn.Module):
    """Queries look at each other, then each reads the pyramid in and around its box."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross_attention = MSDeformAttn(WIDTH, n_levels=3, n_heads=HEADS, n_points=4)
        self.feed_forward = FeedForward()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(
        self, query: Tensor, position: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        at = query + position
        query = self.norms[0](query + self.self_attention(at, at, query, need_weights=False)[0])
        read = self.cross_attention(query + position, boxes.unsqueeze(2), memory, shapes)
        query = self.norms[1](query + read)
        return self.norms[2](query + self.feed_forward(query))


class Heads(nn.Module):
    """The logits of the classes, and what to add to a box before its sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(WIDTH, CLASSES)
        self.box = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        # At first nothing is a digit, and every box stays where it is.
        nn.init.constant_(self.classes.bias, -log(99))
        nn.init.zeros_(self.box[-1].weight)
        nn.init.zeros_(self.box[-1].bias)

    def forward(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), (boxes.logit(1e-4) + self.box(features)).sigmoid()


class Detector(nn.Module):
    """Images to (logits ``[B, Q, CLASSES]``, boxes ``[B, Q, 4]``), of the encoder and of each decoder layer."""

    def __init__(self, encoder_layers: int = 2, decoder_layers: int = 3) -> None:
        super().__init__()

        def block(channels: int, wider: int) -> nn.Sequential:
            halve = nn.Conv2d(channels, wider, 3, 2, 1, bias=False)
            keep = nn.Conv2d(wider, wider, 3, 1, 1, bias=False)
            return nn.Sequential(halve, nn.BatchNorm2d(wider), nn.ReLU(), keep, nn.BatchNorm2d(wider), nn.ReLU())

        self.stem = block(1, 16)
        self.levels = nn.ModuleList([block(16, WIDTH), block(WIDTH, WIDTH), block(WIDTH, WIDTH)])
        self.level_position = nn.Parameter(0.1 * torch.randn(3, WIDTH))
        self.encoder = nn.ModuleList(EncoderLayer() for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer() for _ in range(decoder_layers))
        self.heads = nn.ModuleList(Heads() for _ in range(1 + decoder_layers))
        self.query = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.box_position = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        features, pyramid = self.stem(images), []
        for level in self.levels:
            features = level(features)
            pyramid.append(features)
        shapes = [tuple(level.shape[2:]) for level in pyramid]
        memory = torch.cat([level.flatten(2) for level in pyramid], 2).transpose(1, 2)
        of_levels = zip(self.level_position, pyramid, strict=True)
        position = torch.cat([one.expand(level[0, 0].numel(), -1) for one, level in of_levels])
        anchors = torch.cat([_anchors(shape, 0.1 * 2**i) for i, shape in enumerate(shapes)])
        anchors = anchors.to(images).expand(images.shape[0], -1, -1)
        for layer in self.encoder:
            memory = layer(memory, position, anchors[:, :, None, :2], shapes)
        logits, boxes = self.heads[0](memory, anchors)
        stages = [(logits, boxes)]

        best = logits.amax(-1).topk(QUERIES).indices.unsqueeze(-1)
        query = self.query(memory.gather(1, best.expand(-1, -1, memory.shape[-1])))
        boxes = boxes.gather(1, best.expand(-1, -1, 4))
        for layer, heads in zip(self.decoder, self.heads[1:], strict=True):
            # Every layer corrects the boxes it is given, and does not answer for them.
            boxes = boxes.detach()
            query = layer(query, self.box_position(2 * boxes - 1), boxes, memory, shapes)
            logits, boxes = heads(query, boxes)
            stages.append((logits, boxes))
        return stages


def _anchors(shape: tuple[int, int], size: float) -> Tensor:
    """A square box around the middle of each pixel of a level."""
    rows, columns = ((torch.arange(count) + 0.5) / count for count in shape)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, size), torch.full_like(x, size)], -1).flatten(0, 1)


# %%
# Loss and scores
# ---------------


def set_loss(logits: Tensor, boxes: Tensor, truth: Scenes) -> Tensor:
    """One query for each digit, chosen so that the total cost is least; all others should see nothing."""
    batch, query, digit = match(logits.detach(), boxes.detach(), truth)
    total = max(len(digit), 1)
    target = torch.zeros_like(logits)
    target[batch, query, truth.labels[batch, digit]] = 1
    # The focal loss: the many queries that are rightly sure of nothing should not outweigh the rest.
    wrong = (logits.sigmoid() - target).abs()
    weight = (0.75 - 0.5 * target) * wrong.square()
    classes = (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum() / total
    found, true = boxes[batch, query], truth.boxes[batch, digit]
    distance = (found - true).abs().sum() / total
    apart = (1 - overlaps(found, true)[1]).sum() / total
    return 2 * classes + 5 * distance + 2 * apart


def match(logits: Tensor, boxes: Tensor, truth: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of query and digit, as indices of batch, query and digit."""
    scores = logits.sigmoid()
    said, denied = 0.25 * (1 - scores).square() * F.logsigmoid(logits), 0.75 * scores.square() * F.logsigmoid(-logits)
    classes = (denied - said).take_along_dim(truth.labels.clamp(min=0).unsqueeze(1), 2)
    found, true = boxes.unsqueeze(2), truth.boxes.unsqueeze(1)
    cost = 2 * classes + 5 * (found - true).abs().sum(-1) - 2 * overlaps(found, true)[1]
    pairs = []
    for i, (table, present) in enumerate(zip(cost, truth.present, strict=True)):
        digit = present.nonzero().squeeze(1)
        rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(table[:, digit].cpu().numpy()))
        pairs.append(torch.stack([torch.full_like(rows, i), rows, digit.cpu()[columns]]))
    batch, query, digit = torch.cat(pairs, 1).to(logits.device)
    return batch, query, digit


@dataclass
class Figures:
    """How a detector does on canvases: averaged over classes, and of boxes it is sure of."""

    average_precision: float
    recall: float
    precision: float


@torch.no_grad()
def evaluate(model: Detector, truth: Scenes) -> Figures:
    """A box is right if its class is, its overlap is at least 0.5 and no surer box has found this digit already."""
    model.eval()
    parts = [model(images)[-1] for images in truth.images.split(50)]
    model.train()
    logits, boxes = (torch.cat(part) for part in zip(*parts, strict=True))
    scores, labels = logits.sigmoid().max(-1)
    scores, order = scores.sort(1, descending=True)
    labels = labels.take_along_dim(order, 1)
    boxes = boxes.take_along_dim(order.unsqueeze(-1), 1)
    overlap = overlaps(boxes.unsqueeze(2), truth.boxes.unsqueeze(1))[0]
    overlap = overlap.where(labels.unsqueeze(2) == truth.labels.unsqueeze(1), 0)
    right = torch.zeros_like(labels, dtype=torch.bool)
    waiting = truth.present
    for i in range(QUERIES):
        best, digit = overlap[:, i].where(waiting, 0).max(1, keepdim=True)
        right[:, i : i + 1] = best >= 0.5
        waiting = waiting.scatter(1, digit, waiting.gather(1, digit) & (best < 0.5))

    areas = []
    for label in truth.labels[truth.present].unique():
        hits = right[labels == label][scores[labels == label].argsort(descending=True)]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        # The best precision at this recall or a higher one.
        precision = precision.flip(0).cummax(0).values.flip(0)
        areas.append((precision * hits).sum() / (truth.labels == label).sum())
    sure = scores > SURE
    hits = (right & sure).sum().item()
    return Figures(
        torch.stack(areas).mean().item(), hits / truth.present.sum().item(), hits / max(sure.sum().item(), 1)
    )


# %%
# Pictures
# --------


@torch.no_grad()
def draw(model: Detector, truth: Scenes, file: Path) -> None:
    """Boxes over canvases, and the points that the last decoder layer reads for those found."""
    layer = model.decoder[-1].cross_attention
    seen: list[tuple] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    logits, boxes = model.eval()(truth.images)[-1]
    hook.remove()
    query, references, _, shapes = seen[0]
    points = layer.sampling_locations(query, references, shapes).flatten(2, 4) * CANVAS - 0.5
    weights = layer.attention_weights(query).unflatten(-1, (HEADS, -1)).softmax(-1).flatten(2)
    scores, labels = logits.sigmoid().max(-1)

    colours = ("#ff7f00", "#2f9bff", "#1fc8b0", "#f781bf", "#a6d854", "#ffd92f", "#b15dff", "#e41a1c")
    figure = plt.figure(figsize=(11, 4.1), dpi=100, layout="constrained")
    figure.suptitle("Held-out digits: true boxes dotted, found boxes solid, dots where the decoder read")
    for i, axis in enumerate(figure.subplots(1, len(truth.images), squeeze=False).flat):
        axis.imshow(truth.images[i, 0].numpy(), cmap="gray", vmin=-0.2, vmax=1.1, interpolation="bilinear")
        axis.set(xlim=(-0.5, CANVAS - 0.5), ylim=(CANVAS - 0.5, -0.5), xticks=[], yticks=[])
        for box in truth.boxes[i, truth.present[i]]:
            outline(axis, box, "white", ":")
        sure = (scores[i] > SURE).nonzero().squeeze(1)
        for rank, q in enumerate(sure.tolist()):
            colour = colours[rank % len(colours)]
            outline(axis, boxes[i, q], colour, "-")
            left, top = (boxes[i, q, :2] - boxes[i, q, 2:] / 2) * CANVAS - 0.5
            axis.text(left, top - 0.5, f"{labels[i, q]}", color=colour, fontsize=10, weight="bold", clip_on=True)
            axis.scatter(*points[i, q].T.numpy(), s=150 * weights[i, q].numpy(), color=colour, alpha=0.8, linewidths=0)
    figure.savefig(file)


def outline(axis, box: Tensor, colour: str, style: str) -> None:
    left, top = (box[:2] - box[2:] / 2) * CANVAS - 0.5
    right, bottom = (box[:2] + box[2:] / 2) * CANVAS - 0.5
    x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axis.plot(x, y, color=colour, linestyle=style, linewidth=1.3)


def draw_loss(trained: dict[str, "Trained"], file: Path) -> None:
    """The running mean of the loss, and the average precision on held-out digits, of each detector."""
    figure = plt.figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in trained.items():
        left.plot(running_mean(result.losses), label=name)
        right.plot(list(result.precisions), list(result.precisions.values()), marker=".", label=name)
    left.set(xlabel="step", ylabel="loss of all layers, mean of 20 steps", ylim=(0, None))
    right.set(xlabel="step", ylabel="held-out AP at IoU 0.5", ylim=(0, 1))
    left.legend()
    figure.savefig(file)


def running_mean(losses: list[float], window: int = 20) -> list[float]:
    return [sum(part) / len(part) for part in (losses[max(0, i - window + 1) : i + 1] for i in range(len(losses)))]


# %%
# Training
# --------


@dataclass
class Trained:
    """What came of training."""

    model: Detector
    losses: list[float]
    precisions: dict[int, float]
    seconds: float


def train(name: str, deformable: bool, steps: int, seed: int, known: Digits, held_out: Scenes) -> Trained:
    """Train a detector for ``steps`` batches; without ``deformable``, its points do not move."""
    torch.manual_seed(seed)
    model = Detector()
    if not deformable:
        for module in model.modules():
            if isinstance(module, MSDeformAttn):
                module.sampling_offsets.requires_grad_(False)
    few = Scenes(held_out.images[:60], held_out.boxes[:60], held_out.labels[:60])
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 + cos(pi * step / steps)) / 2
    )
    losses: list[float] = []
    precisions = {}
    text = TextColumn("loss {task.fields[loss]:.2f}  held-out AP {task.fields[ap]:.1%}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=steps, loss=0.0, ap=0.0)
        for step in range(steps):
            truth = scenes(known, BATCH)
            loss = sum(set_loss(*stage, truth) for stage in model(truth.images))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            mean = running_mean(losses[-20:])[-1]
            if step % 150 == 149:
                precisions[step] = evaluate(model, few).average_precision
                progress.update(task, ap=precisions[step])
                if not progress.console.is_terminal:
                    # The bar is only drawn on a terminal.
                    print(f"{name}: step {step + 1}  loss {mean:.2f}  AP {precisions[step]:.1%}", flush=True)
            progress.update(task, advance=1, loss=mean)
    return Trained(model, losses, precisions, time.perf_counter() - start)


def main(steps: int = 600, seed: int = 0, output: str | Path = ".") -> None:
    output = Path(output)
    torch.manual_seed(seed)
    known, unknown = digits()
    held_out = scenes(unknown, 300)
    trained = {
        name: train(name, name == "deformable", steps, seed, known, held_out) for name in ("plain", "deformable")
    }
    figures = {name: evaluate(result.model, held_out) for name, result in trained.items()}
    print(f"{held_out.present.sum()} held-out digits on {len(held_out.images)} canvases, one seed:")
    print(f"{'':30}" + "".join(f"{name:>12}" for name in trained))
    for title, field in (
        ("found", "recall"),
        ("right, of the boxes given", "precision"),
        ("average precision at IoU 0.5", "average_precision"),
    ):
        print(f"{title:30}" + "".join(f"{getattr(found, field):12.1%}" for found in figures.values()))
    print(f"{'loss at the end':30}" + "".join(f"{running_mean(r.losses)[-1]:12.2f}" for r in trained.values()))
    print(f"{'seconds of training':30}" + "".join(f"{r.seconds:12.1f}" for r in trained.values()))
    best = max(figures, key=lambda name: figures[name].average_precision)
    print(f"the higher average precision is that of the {best} detector")
    shown = Scenes(held_out.images[:3], held_out.boxes[:3], held_out.labels[:3])
    draw(trained["deformable"].model, shown, output / "detected_digits.png")
    draw_loss(trained, output / "detection_loss.png")
    print(f"pictures: {output / 'detected_digits.png'}, {output / 'detection_loss.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find scanned digits with a small Deformable DETR.")
    parser.add_argument("--steps", type=int, default=600, help="how many batches to train each detector with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("."), help="the folder for the pictures")
    main(**vars(parser.parse_args()))
