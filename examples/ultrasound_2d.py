"""
A missing frame of an ultrasound video (2-D, two frames)
========================================================

Between two frames of a beating heart, a third is missing. Two networks predict it from its neighbours: one with plain
convolutions, one that first aligns each neighbour with a deformable convolution, which is how video restoration uses
them. The average of the neighbours is the baseline that both have to beat.

The video has 30 frames and ships with pydicom as test data. The first 20 frames are for training, the others for
testing. Both show the same heart: the result compares two networks on this video alone.

The number of training steps can be given as an argument: ``python ultrasound_2d.py 10``.
"""

import sys
import time
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from pydicom import dcmread
from pydicom.data import get_testdata_file
from torch import Tensor, nn

import deformkit as dk
from deformkit import viz

STEPS = int(sys.argv[1]) if sys.argv[1:] else 300
PATCH = 64

# %%
# The video
# ---------
#
# The fan of the probe is cut out. Triplets in which a frame repeats are left out.

video = dcmread(get_testdata_file("examples_ybr_color.dcm", download=False)).pixel_array
frames = torch.from_numpy(video[:, 24:208, 88:248, 0].copy()).float() / 255


def triplets(first: int, last: int) -> list[tuple[int, int, int]]:
    """The frames before, between and after, among those from ``first`` to ``last``."""
    found = [(i - 1, i, i + 1) for i in range(first + 1, last - 1)]
    return [t for t in found if all((frames[a] - frames[b]).abs().mean() > 0 for a, b in pairwise(t))]


TRAIN, TEST = triplets(0, 20), triplets(20, len(frames))
print(f"{len(TRAIN)} triplets to train, {len(TEST)} to test, of {list(frames.shape[1:])} pixels")

# %%
# The networks
# ------------
#
# Both get the two neighbours, and add what they predict to their average. The deformable one shifts the features of
# each neighbour by offsets that it predicts from both.


def convolutions(*widths: int) -> list[nn.Module]:
    """3x3 convolutions, each followed by a leaky ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
    return layers


class Plain(nn.Module):
    """Convolutions of the neighbours, side by side."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(*convolutions(1, width, width))
        self.both = nn.Sequential(*convolutions(2 * width, 2 * width, 2 * width, 2 * width))
        self.head = nn.Conv2d(2 * width, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def aligned(self, features: Tensor, both: Tensor, which: int) -> Tensor:
        return features

    def forward(self, neighbours: Tensor) -> Tensor:
        # Most of the fan is dark: brought to about zero mean and unit variance.
        parts = [self.features(6 * neighbours[:, i : i + 1] - 0.5) for i in range(2)]
        both = torch.cat(parts, 1)
        aligned = [self.aligned(part, both, i) for i, part in enumerate(parts)]
        return neighbours.mean(1, keepdim=True) + self.head(self.both(torch.cat(aligned, 1)))


class Aligning(Plain):
    """The same with features that are aligned by :class:`deformkit.nn.DeformConv2d`."""

    def __init__(self, width: int = 16, groups: int = 4) -> None:
        super().__init__(width)
        taps = 9 * groups
        self.align = nn.ModuleList(
            dk.nn.DeformConv2d(width, width, 3, padding=1, offset_groups=groups) for _ in range(2)
        )
        self.offsets = nn.ModuleList(
            nn.Sequential(*convolutions(2 * width, width), nn.Conv2d(width, 2 * taps, 3, padding=1)) for _ in range(2)
        )
        for head in self.offsets:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def aligned(self, features: Tensor, both: Tensor, which: int) -> Tensor:
        return features + self.align[which](features, self.offsets[which](both))


# %%
# Training
# --------


def crops(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops of neighbours ``[B, 2, PATCH, PATCH]``, and of the frames between, mirrored at random."""
    chosen = []
    for index in torch.randint(len(TRAIN), (count,), generator=generator).tolist():
        corner = [int(torch.randint(n - PATCH, (1,), generator=generator)) for n in frames.shape[1:]]
        crop = frames[list(TRAIN[index]), corner[0] : corner[0] + PATCH, corner[1] : corner[1] + PATCH]
        chosen.append(crop.flip(-1) if torch.rand(1, generator=generator) < 0.5 else crop)
    stack = torch.stack(chosen)
    return stack[:, [0, 2]], stack[:, 1:2]


def psnr(found: Tensor, true: Tensor) -> float:
    """The peak signal-to-noise ratio in decibels, ``-10 * log10(mean squared error)``."""
    return -10 * (found - true).square().mean().log10().item()


def train(model: nn.Module) -> None:
    """Train a network on crops."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(STEPS, 2))
    for step in range(STEPS):
        neighbours, target = crops(8, generator)
        loss = (model(neighbours) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"    step {step:4d}  loss {loss:.4f}", flush=True)


neighbours = torch.stack([frames[[a, b]] for a, _, b in TEST])
truth = torch.stack([frames[i : i + 1] for _, i, _ in TEST])
found = {"average": neighbours.mean(1, keepdim=True)}
models = {"plain": Plain, "deformable": Aligning}
for name, make in models.items():
    print(name, flush=True)
    torch.manual_seed(0)
    models[name] = make()
    start = time.perf_counter()
    train(models[name])
    print(f"    trained in {time.perf_counter() - start:.1f} s", flush=True)
    with torch.no_grad():
        found[name] = models[name](neighbours)

# %%
# Which one wins
# --------------

print(f"PSNR on {len(TEST)} held-out frames, one seed")
scores = {name: psnr(value, truth) for name, value in found.items()}
for name, score in scores.items():
    count = sum(p.numel() for p in models[name].parameters()) if name in models else 0
    print(f"{name:12}  {count:7} parameters  {score:.2f} dB")
print(f"the highest is that of: {max(scores, key=scores.get)}")

figure, axes = plt.subplots(2, 4, figsize=(10, 5.6), layout="constrained")
for column, (name, value) in zip(axes.T, {"truth": truth, **found}.items(), strict=True):
    column[0].imshow(value[0, 0].numpy(), cmap="gray", vmin=0, vmax=0.8)
    column[0].set_title(name, fontsize=9)
    column[1].imshow((value - truth)[0, 0].abs().numpy(), cmap="magma", vmin=0, vmax=0.2)
    for panel in column:
        panel.axis("off")
figure.suptitle("A held-out frame as the networks predict it, and the absolute error", fontsize=10)
figure.savefig("ultrasound_2d_frames.png")

# %%
# What the alignment does
# -----------------------
#
# Arrows lead from each position to the mean of its samples in the frame before.

sampled = viz.sampling(models["deformable"], neighbours[:1])
sampled.plot("offsets", layer="align.0", image=neighbours[0, :1]).savefig("ultrasound_2d_offsets.png")
