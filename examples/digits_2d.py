"""
Warped digits: plain and deformable convolutions (2-D)
======================================================

Three classifiers are trained on scanned digits that are rotated, scaled, sheared and bent at random: one with plain
convolutions, one whose last three convolutions are deformable, and a wider plain one with more parameters than the
deformable one. All see the same images in the same order. The digits are those of scikit-learn; a third of them is held
out for testing.

The number of training steps can be given as an argument: ``python digits_2d.py 100``.
"""

import sys
import time
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit import viz
from deformkit.demo import load_digits, warp

STEPS = int(sys.argv[1]) if sys.argv[1:] else 300
SEEDS = range(3) if STEPS >= 100 else range(1)
BATCH = 50

# %%
# The data
# --------
#
# ``load_digits`` enlarges the scans to 32x32 pixels. Training images are warped anew in every step; each test image is
# warped three times, once and for all.

data = load_digits(seed=0)
figure, axes = plt.subplots(2, 8, figsize=(9, 2.6), layout="constrained")
for i, column in enumerate(axes.T):
    column[0].imshow(data.train_images[i, 0].numpy(), cmap="gray")
    column[1].imshow(warp(data.train_images[i : i + 1], torch.Generator().manual_seed(i))[0, 0].numpy(), cmap="gray")
    for axis in column:
        axis.axis("off")
figure.suptitle("Scanned digits, and a warp of each", fontsize=10)
figure.savefig("digits_2d_data.png")

# %%
# The networks
# ------------
#
# A modulated :class:`deformkit.nn.PackedDeformConv2d` predicts its offsets and masks from its input. Its offset head
# starts at zero, so that the deformable network computes the plain one before the first step.


def network(layer: type[nn.Module], widths: tuple[int, int, int], **options: bool) -> nn.Sequential:
    """A stem and three 3x3 convolutions of class ``layer``."""
    blocks: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for before, after, stride in zip((16, *widths), widths, (1, 2, 1), strict=False):
        blocks += [layer(before, after, 3, stride, 1, bias=False, **options), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


NETWORKS = {
    "plain": lambda: network(nn.Conv2d, (24, 32, 48)),
    "deformable": lambda: network(dk.nn.PackedDeformConv2d, (24, 32, 48), modulated=True),
    "wider plain": lambda: network(nn.Conv2d, (32, 48, 72)),
}

# %%
# Training
# --------
#
# :func:`deformkit.param_groups` gives the offset heads a learning rate of their own. :func:`deformkit.monitor` measures
# one step in ten.


def train(model: nn.Module, seed: int) -> list[tuple[int, dict[str, dict[str, float]]]]:
    """Train a network; return what the monitor measured, by step."""
    generator = torch.Generator().manual_seed(seed)
    deformable = any(isinstance(module, dk.nn.PackedDeformConv2d) for module in model.modules())
    groups = dk.param_groups(model, 4e-3, offset_lr_mult=0.5) if deformable else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=4e-3, weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(STEPS, 2))
    measured = []
    with dk.monitor(model, every=10) as monitor:
        for step in range(STEPS):
            chosen = torch.randint(len(data.train_labels), (BATCH,), generator=generator)
            images = warp(data.train_images[chosen], generator)
            loss = F.cross_entropy(model(images), data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                measured.append((step, monitor.latest))
            if step % 100 == 0:
                print(f"    step {step:4d}  loss {loss:.3f}", flush=True)
    return measured


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that a network classifies correctly."""
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in images.split(300)])
    return (found == labels).float().mean().item()


results: dict[str, list[float]] = {name: [] for name in NETWORKS}
models, history, seconds = {}, [], dict.fromkeys(NETWORKS, 0.0)
for seed in SEEDS:
    for name, make in NETWORKS.items():
        print(f"{name}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        models[name] = make()
        start = time.perf_counter()
        measured = train(models[name], seed)
        seconds[name] += time.perf_counter() - start
        results[name].append(accuracy(models[name], data.test_images, data.test_labels))
        if name == "deformable":
            history = measured

# %%
# Which one wins
# --------------

print(
    f"{'network':12}  parameters  seconds  accuracy on {len(data.test_labels)} warped test digits, {len(SEEDS)} seeds"
)
for name, found in results.items():
    count = sum(p.numel() for p in models[name].parameters())
    spread = f" +- {stdev(found):.1%}" if len(found) > 1 else ""
    print(f"{name:12}  {count:10}  {seconds[name] / len(SEEDS):7.1f}  {mean(found):.1%}{spread}")
best = max(results, key=lambda name: mean(results[name]))
print(f"the best mean accuracy is that of the {best} network")

# %%
# What the offsets do
# -------------------
#
# The monitor shows how far the samples of each layer move during training; the picture after it, where the last layer
# samples for one position, on a held-out digit. The samples are drawn larger where the mask is.

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for layer in history[-1][1]:
    axis.plot([step for step, _ in history], [found[layer]["offset_mean"] for _, found in history], label=layer)
axis.set(xlabel="step", ylabel="mean length of offsets, pixels")
axis.legend(title="layer")
figure.savefig("digits_2d_offsets.png")

found = viz.sampling(models["deformable"].eval(), data.test_images[:1])
figure = found.plot("position", layer=-1)
figure.savefig("digits_2d_samples.png")
