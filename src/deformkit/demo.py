"""The demonstration: the same small network with plain and with deformable layers, on warped handwritten digits."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nn import PackedDeformConv2d

CANVAS = 32
BATCH = 50
TEST_WARPS = 3
LEARNING_RATE = 4e-3

# Colours of the nine taps in row-major order, and of the points of plain convolutions.
TAPS = ["#e41a1c", "#ff7f00", "#ffd92f", "#f781bf", "#ffffff", "#a6d854", "#b15dff", "#2f9bff", "#1fc8b0"]
UNDEFORMED = "#9fb4c7"


@dataclass
class Result:
    """The results of one network."""

    name: str
    network: nn.Sequential
    accuracy: float = 0.0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """The number of learnable parameters."""
        return sum(p.numel() for p in self.network.parameters())


@dataclass
class Data:
    """Digits, split into training and test images; test images are warped once, training images anew in each epoch."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def network(deformable: bool) -> nn.Sequential:
    """A classifier of a stem and three 3x3 convolutions, which are plain or modulated deformable ones."""

    def block(layer: nn.Module, channels: int) -> list[nn.Module]:
        return [layer, nn.BatchNorm2d(channels), nn.ReLU()]

    def conv(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        if deformable:
            return PackedDeformConv2d(in_channels, out_channels, 3, stride, 1, bias=False, modulated=True)
        return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)

    return nn.Sequential(
        *block(nn.Conv2d(1, 16, 3, 2, 1, bias=False), 16),
        *block(conv(16, 24, 1), 24),
        *block(conv(24, 32, 2), 32),
        *block(conv(32, 48, 1), 48),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def load_digits(seed: int) -> Data:
    """Scanned digits, two thirds to train and one third to test; each test digit in ``TEST_WARPS`` fixed warps."""
    from sklearn.datasets import load_digits as load

    digits = load()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.from_numpy(digits.images).float()[order, None] / 16
    labels = torch.from_numpy(digits.target).long()[order]
    images = F.interpolate(images, scale_factor=4, mode="bicubic").clamp(0, 1)
    train = len(order) * 2 // 3
    test_images = images[train:].repeat(TEST_WARPS, 1, 1, 1)
    return Data(images[:train], labels[:train], warp(test_images, generator), labels[train:].repeat(TEST_WARPS))


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear, shift and bend each digit at random, on a canvas of ``CANVAS`` pixels."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, shear = uniform(-0.7, 0.7), uniform(-0.4, 0.4)
    scale = uniform(1.2, 2.2, 1) * uniform(0.85, 1.15, 2)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(count, 2, 2)
    slant = torch.stack([torch.ones(count), shear, torch.zeros(count), torch.ones(count)], -1).reshape(count, 2, 2)
    matrix = scale.unsqueeze(-1) * (slant @ rotation)
    centre = uniform(-0.25, 0.25, 2, 1)
    grid = F.affine_grid(torch.cat([matrix, -matrix @ centre], -1), [count, 1, CANVAS, CANVAS], align_corners=False)
    bend = 0.14 * torch.randn(count, 2, 4, 4, generator=generator)
    bend = F.interpolate(bend, (CANVAS, CANVAS), mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + bend.movedim(1, -1), align_corners=False)


def train(result: Result, data: Data, seed: int, steps: int, progress: Callable[[float], None]) -> None:
    """Train for ``steps`` batches, then measure the accuracy on the test half."""
    generator = torch.Generator().manual_seed(seed)
    model = result.network.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 2))
    batches = _batches(data, generator)
    start = time.perf_counter()
    for _ in range(steps):
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        result.losses.append(loss.item())
        progress(mean(result.losses[-20:]))
    result.seconds = time.perf_counter() - start
    with torch.inference_mode():
        predicted = torch.cat([model.eval()(part).argmax(1) for part in data.test_images.split(200)])
    result.accuracy = (predicted == data.test_labels).float().mean().item()


def _batches(data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        images = warp(data.train_images, generator)
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(index) == BATCH:
                yield images[index], data.train_labels[index]


@dataclass
class Look:
    """The points of the image on which one output position of the network depends."""

    image: Tensor
    label: int
    predicted: int
    points: Tensor
    weights: Tensor
    undeformed: Tensor
    position: Tensor


@torch.inference_mode()
def look(model: nn.Sequential, image: Tensor, label: int) -> Look:
    """Trace the position with the largest evidence for the predicted digit back to points of the image.

    A layer samples its input at ``stride*p - padding + dilation*k + offset(p)``. These points are positions in the
    output of the previous layer, whose offsets are interpolated there, and so on: one point for each path of taps.
    """
    model.eval()
    layers: list[tuple[nn.Module, Tensor | None, Tensor | None]] = []
    value = image.unsqueeze(0)
    features = value
    for module in model:
        if isinstance(module, PackedDeformConv2d):
            layers.append((module, *module.predict(value)))
        elif isinstance(module, nn.Conv2d):
            layers.append((module, None, None))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            features = value
        value = module(value)
    predicted = int(value.argmax())
    classifier = model[-1]
    assert isinstance(classifier, nn.Linear)
    evidence = torch.einsum("chw,c->hw", features[0], classifier.weight[predicted])
    row, column = divmod(int(evidence.argmax()), evidence.shape[1])
    position = torch.tensor([[row, column]], dtype=torch.float32)
    points, weights = _trace(layers, position, deformed=True)
    undeformed, _ = _trace(layers, position, deformed=False)
    return Look(image[0], label, predicted, points, weights, undeformed, undeformed.mean(0))


def _trace(layers: list[Any], points: Tensor, deformed: bool) -> tuple[Tensor, Tensor]:
    weights = torch.ones(len(points))
    for layer, offset, mask in reversed(layers):
        stride = torch.tensor(layer.stride)
        if offset is None:
            # The window of a plain layer is represented by its centre.
            middle = [
                d * (k - 1) / 2 - p for d, k, p in zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)
            ]
            points = stride * points + torch.tensor(middle)
            continue
        taps = layer.sampling_locations(offset.new_zeros(1, offset.shape[1], 1, 1))[0, 0, :, 0, 0]
        shift = _at(offset, points).unflatten(1, taps.shape) if deformed else 0
        weights = (weights.unsqueeze(1) * _at(mask, points)).flatten()
        points = ((stride * points).unsqueeze(1) + taps + shift).flatten(0, 1)
    return points, weights


def _at(maps: Tensor, points: Tensor) -> Tensor:
    """``maps [1, C, H, W]`` interpolated at ``points [P, 2]``, as ``[P, C]``."""
    last = torch.tensor(maps.shape[2:]) - 1
    grid = (2 * points / last - 1).flip(-1).reshape(1, 1, -1, 2)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=True)[0, :, 0].T


def picture(looks: list[Look], out: str | Path, title: str) -> None:
    """Draw the points over the digits, two rows of them."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = (len(looks) + 1) // 2
    figure = Figure(figsize=(2.3 * columns, 5.9), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, seen in zip(axes.flat, looks, strict=False):
        axis.imshow(seen.image.numpy(), cmap="gray", vmin=0, vmax=1.3, interpolation="bilinear")
        share = len(seen.points) // len(TAPS)
        shade = [colour for colour in TAPS for _ in range(share)]
        axis.scatter(
            *seen.undeformed.unique(dim=0).flip(1).T.numpy(),
            s=7,
            facecolors="none",
            edgecolors=UNDEFORMED,
            linewidths=0.4,
        )
        axis.scatter(
            *seen.points.flip(1).T.numpy(),
            s=(3 * seen.weights).clamp(0.5, 12).numpy(),
            c=shade,
            alpha=0.75,
            linewidths=0,
        )
        axis.plot(*seen.position.flip(0).tolist(), marker="+", color="white", markersize=9, markeredgewidth=1.2)
        axis.set(xlim=(-0.5, CANVAS - 0.5), ylim=(CANVAS - 0.5, -0.5))
        right = seen.predicted == seen.label
        text = f"{seen.label}" if right else f"{seen.label}, taken for {seen.predicted}"
        axis.set_title(text, fontsize=11, color="black" if right else "#b3261e")

    def handle(marker: str, colour: str, face: str, size: float) -> Line2D:
        style = {"markersize": size, "markeredgecolor": colour, "markerfacecolor": face}
        return Line2D([], [], linestyle="", marker=marker, **style)  # type: ignore[arg-type]

    # A legend is filled column by column: first the nine taps in their places, then the other entries.
    heights, sides = ("top", "middle", "bottom"), ("left", "middle", "right")
    names = {f"{row} {column}": 3 * i + j for j, column in enumerate(sides) for i, row in enumerate(heights)}
    handles = [handle("o", TAPS[tap], TAPS[tap], 5) for tap in names.values()]
    handles += [handle("o", UNDEFORMED, "none", 4), handle("+", "white", "none", 8)]
    figure.legend(
        handles,
        [*names, "the same without offsets: a plain convolution's points", "the output position"],
        title="points of one output position, by tap of the last deformable layer; larger where the mask is",
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        title_fontsize=9,
        facecolor="#202020",
        framealpha=1,
        labelcolor="white",
    ).get_title().set_color("white")
    figure.savefig(out)


def main(
    seeds: int = 3, epochs: int = 25, out: str | Path = "warped_digits.png", steps: int | None = None
) -> list[Any]:
    """Train both networks for each seed, print their accuracies, and draw where the deformable one samples.

    Args:
        seeds: number of repetitions; the seed determines the split, the warps, the order and the initial weights.
        epochs: number of passes over the training images, each with other warps.
        out: the file of the picture; its suffix determines the format.
        steps: number of batches, in place of ``epochs``.

    Returns:
        For each seed the :class:`Result` of the plain and of the deformable network.

    Raises:
        SystemExit: a package that the demonstration needs is missing.
        ValueError: an argument is not valid; nothing is trained.
    """
    for module, package in (("rich", "rich"), ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise SystemExit(f"deformkit: the demo needs {package}; pip install 'deformkit[demo]' brings it")
    for name, value in {"seeds": seeds, "epochs": epochs, "steps": 1 if steps is None else steps}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    out = Path(out)
    if out.suffix not in (".png", ".pdf", ".svg") or not out.absolute().parent.is_dir():
        raise ValueError(f"out is {str(out)!r}; it must be a .png, .pdf or .svg file in a folder that exists")

    from rich.console import Console

    from ._progress import training

    console = Console()
    console.print(
        "Scanned digits, warped at random: a small network with plain and with deformable layers. Both start from the "
        "same weights and see the same images in the same order, as often. "
        f"Seeds: {seeds}. Threads: {torch.get_num_threads()}."
    )
    results: list[list[Result]] = []
    with torch.random.fork_rng(devices=[]), training(console) as begin:
        for seed in range(seeds):
            data = load_digits(seed)
            count = steps or epochs * (len(data.train_images) // BATCH)
            pair = []
            for name in ("plain", "deformable"):
                torch.manual_seed(seed)
                result = Result(name, network(name == "deformable"))
                train(result, data, seed, count, begin(f"seed {seed}  {name}", count))
                pair.append(result)
            results.append(pair)
    console.print(_table(results))
    console.print(
        "Spread: sample standard deviation. The additional parameters of the deformable network predict its offsets "
        "and masks."
    )

    chosen = [int((data.test_labels == digit).nonzero()[0]) for digit in range(10)]
    looks = [look(pair[1].network, data.test_images[i], int(data.test_labels[i])) for i in chosen]
    picture(looks, out, "Where the network with deformable layers looks: warped test digits it was not trained on")
    console.print(f"Where the deformable network looks: {out}", soft_wrap=True)
    return results


def _table(results: list[list[Result]]) -> Any:
    from rich.table import Table

    table = Table("", "plain", "deformable", "difference", title="accuracy on warped test digits")
    for column in table.columns[1:]:
        column.justify = "right"
    accuracies = [[100 * result.accuracy for result in pair] for pair in results]
    rows = [(plain, deformable, deformable - plain) for plain, deformable in accuracies]
    for seed, (plain, deformable, difference) in enumerate(rows):
        table.add_row(f"seed {seed}", f"{plain:.1f} %", f"{deformable:.1f} %", f"{difference:+.1f} points")
    table.add_section()
    columns = list(zip(*rows, strict=True))
    if len(rows) > 1:
        spreads = [
            f"{mean(column):{sign}.1f} ± {stdev(column):.1f}" for column, sign in zip(columns, "--+", strict=True)
        ]
        table.add_row("mean ± spread", *spreads)
        table.add_section()
    seconds = [mean(pair[i].seconds for pair in results) for i in (0, 1)]
    table.add_row("time to train", *(f"{value:.1f} s" for value in seconds), f"{seconds[1] / seconds[0]:.2f}x")
    counts = [result.parameters for result in results[0]]
    table.add_row("parameters", *(f"{count:,}" for count in counts), f"{counts[1] / counts[0]:.2f}x")
    return table
