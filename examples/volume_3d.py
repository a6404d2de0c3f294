"""
Tubes in noisy volumes (3-D)
============================

Thin tubes run in any direction through noisy volumes. Two small networks segment them: one with plain convolutions, one
whose middle layer is deformable and can bend along a tube. The volumes are made up; *Grey and white matter with a plain
and a deformable U-Net* has real ones.

The number of training steps can be given as an argument: ``python volume_3d.py 10``.
"""

import sys
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deformkit import viz
from deformkit.nn import PackedDeformConv3d

STEPS = int(sys.argv[1]) if sys.argv[1:] else 200

# %%
# The volumes
# -----------


def volumes(count: int, generator: torch.Generator, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy volumes ``[B, 1, D, H, W]`` with a straight tube in each, and which voxels belong to it."""
    line = torch.linspace(-1, 1, size)
    voxels = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    direction = F.normalize(torch.randn(count, 1, 1, 1, 3, generator=generator), dim=-1)
    away = voxels - 0.5 * (torch.rand(count, 1, 1, 1, 3, generator=generator) - 0.5)
    along = (away * direction).sum(-1, keepdim=True) * direction
    inside = (away - along).norm(dim=-1) < 0.17
    noise = 0.6 * torch.randn(inside.shape, generator=generator)
    return (inside + noise).unsqueeze(1), inside.unsqueeze(1).float()


# %%
# The networks
# ------------


def network(layer: type[nn.Module], **options: bool | str) -> nn.Sequential:
    """One logit for each voxel."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.ReLU(),
        layer(8, 8, 3, padding=2, dilation=2, **options),
        nn.ReLU(),
        nn.Conv3d(8, 1, 3, padding=1),
    )


NETWORKS = {
    "plain": lambda: network(nn.Conv3d),
    "deformable": lambda: network(PackedDeformConv3d, modulated=True, boundary="border"),
}


def train(model: nn.Module) -> None:
    """Train a network on new volumes in each step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        volume, inside = volumes(4, generator)
        loss = F.binary_cross_entropy_with_logits(model(volume), inside, pos_weight=torch.tensor(5.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"    step {step:3d}  loss {loss:.3f}", flush=True)


# %%
# Which one wins
# --------------

volume, inside = volumes(64, torch.Generator().manual_seed(1000))
models, found, scores = {}, {}, {}
for name, make in NETWORKS.items():
    print(name, flush=True)
    torch.manual_seed(0)
    models[name] = make()
    start = time.perf_counter()
    train(models[name])
    print(f"    trained in {time.perf_counter() - start:.1f} s", flush=True)
    with torch.no_grad():
        found[name] = (models[name](volume) > 0).float()
    scores[name] = (2 * (found[name] * inside).sum() / (found[name].sum() + inside.sum())).item()

print(f"Dice overlap with the tubes of {len(volume)} new volumes, one seed")
for name, score in scores.items():
    print(f"{name:12}  {sum(p.numel() for p in models[name].parameters()):6} parameters  {score:.3f}")
print(f"the better one is the {max(scores, key=scores.get)} network")

figure, axes = plt.subplots(1, 4, figsize=(9, 2.5), layout="constrained")
for axis, (title, shown) in zip(axes, {"input": volume, "truth": inside, **found}.items(), strict=True):
    axis.imshow(shown[0, 0].amax(0).numpy(), cmap="gray")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
figure.suptitle("A new volume, its maximum along the first axis", fontsize=10)
figure.savefig("volume_3d_tubes.png")

# %%
# Where a voxel looks
# -------------------

sampled = viz.sampling(models["deformable"], volume[:1])
sampled.plot("position").savefig("volume_3d_samples.png")
