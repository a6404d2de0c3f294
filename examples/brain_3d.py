"""
Grey and white matter with a plain and a deformable U-Net (3-D)
===============================================================

Two U-Nets segment grey and white matter in the MNI152 template, an average of 152 brains that ships with nilearn: one
with plain convolutions, one whose coarser levels have deformable ones. They are trained on the rear half of the volume,
with random rotations, scales, noise and shading, and tested on the front half, changed in the same way. The template is
one volume and smoother than any single brain: the result compares two networks, and is no measure of clinical use.

The number of training steps can be given as an argument: ``python brain_3d.py 10``.
"""

import sys
import time
from statistics import mean

import matplotlib.pyplot as plt
import torch
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit import viz

STEPS = int(sys.argv[1]) if sys.argv[1:] else 250
PATCH = 32
CLASSES = ("other", "grey matter", "white matter")

# %%
# The volume
# ----------
#
# At 3 mm the template has 66x78x63 voxels. A voxel belongs to the tissue whose probability is above one half.

brain, grey, white = (
    torch.from_numpy(load(resolution=3).get_fdata()).float()
    for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
)
brain = (brain - brain.mean()) / brain.std()
labels = torch.where(white > 0.5, 2, torch.where(grey > 0.5, 1, 0))
middle = brain.shape[1] // 2
print("volume", list(brain.shape), "shares of the classes", [f"{(labels == c).float().mean():.2f}" for c in range(3)])


def halves(rear: bool) -> tuple[Tensor, Tensor]:
    """One half of the volume ``[1, 1, X, Y, Z]`` and of its labels."""
    part = slice(None, middle) if rear else slice(middle, None)
    return brain[None, None, :, part], labels[None, None, :, part].float()


def patches(count: int, rear: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches ``[B, 1, PATCH, PATCH, PATCH]``, rotated, scaled, shaded and noisy, and their labels."""
    volume, truth = halves(rear)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    # A random rotation is the orthogonal factor of a matrix near the identity.
    near = torch.eye(3) + 0.4 * torch.randn(count, 3, 3, generator=generator)
    rotation, upper = torch.linalg.qr(near)
    rotation = rotation * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    # affine_grid takes the last axis first, and extents of 2.
    extent = PATCH / torch.tensor(volume.shape[:1:-1])
    matrix = rotation * (extent.mean() * uniform(0.8, 1.25, 1, 1))
    centre = uniform(-0.3, 0.3, 3, 1)
    grid = F.affine_grid(torch.cat([matrix, centre], -1), [count, 1, PATCH, PATCH, PATCH], align_corners=False)
    moved = F.grid_sample(volume.expand(count, -1, -1, -1, -1), grid, align_corners=False, padding_mode="border")
    target = F.grid_sample(truth.expand(count, -1, -1, -1, -1), grid, mode="nearest", align_corners=False)
    shading = F.interpolate(0.2 * torch.randn(count, 1, 3, 3, 3, generator=generator), PATCH, mode="trilinear")
    noise = 0.25 * torch.randn(moved.shape, generator=generator)
    return moved * (1 + shading) + noise, target[:, 0].long()


# %%
# The networks
# ------------
#
# Both have the same levels of 8, 16 and 32 channels. In the deformable one, the second convolution of the two coarser
# levels is a :class:`deformkit.nn.PackedDeformConv3d`. With 27 taps, a 3-D layer predicts 81 coordinates for every
# position, so that it is cheapest where there are few positions.


def block(before: int, after: int, second: type[nn.Module]) -> nn.Sequential:
    """Two 3x3x3 convolutions."""
    return nn.Sequential(
        nn.Conv3d(before, after, 3, padding=1),
        nn.InstanceNorm3d(after, affine=True),
        nn.ReLU(),
        second(after, after, 3, padding=1),
        nn.InstanceNorm3d(after, affine=True),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """A U-Net of three levels whose coarser levels have ``layer`` as their second convolution."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.fine, self.middle, self.coarse = block(1, 8, nn.Conv3d), block(8, 16, layer), block(16, 32, layer)
        self.middle_up, self.fine_up = block(48, 16, nn.Conv3d), block(24, 8, nn.Conv3d)
        self.head = nn.Conv3d(8, len(CLASSES), 1)

    def forward(self, volume: Tensor) -> Tensor:
        fine = self.fine(volume)
        middle = self.middle(F.max_pool3d(fine, 2))
        coarse = self.coarse(F.max_pool3d(middle, 2))
        middle = self.middle_up(torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1))
        return self.head(self.fine_up(torch.cat([fine, F.interpolate(middle, scale_factor=2)], 1)))


# %%
# Training
# --------


def dice(found: Tensor, true: Tensor, label: int) -> float:
    """``2 |A and B| / (|A| + |B|)`` of the voxels of one class."""
    a, b = found == label, true == label
    return (2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1)).item()


def train(model: nn.Module) -> None:
    """Train a network on patches of the rear half; offset heads learn at a tenth of the rate of the others."""
    generator = torch.Generator().manual_seed(1)
    deformable = any(isinstance(module, dk.nn.PackedDeformConv3d) for module in model.modules())
    optimizer = torch.optim.AdamW(dk.param_groups(model, 5e-3, 0.1) if deformable else model.parameters(), lr=5e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(STEPS, 2))
    for step in range(STEPS):
        volumes, truth = patches(2, True, generator)
        loss = F.cross_entropy(model(volumes), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"    step {step:4d}  loss {loss:.3f}", flush=True)


test_volumes, test_labels = patches(12, False, torch.Generator().manual_seed(1000))
models, found, scores = {}, {}, {}
for name, layer in (("plain", nn.Conv3d), ("deformable", dk.nn.PackedDeformConv3d)):
    print(name, flush=True)
    torch.manual_seed(0)
    models[name] = UNet(layer)
    start = time.perf_counter()
    train(models[name])
    print(f"    trained in {time.perf_counter() - start:.1f} s", flush=True)
    with torch.no_grad(), dk.monitor(models[name].eval()) as monitor:
        found[name] = torch.cat([models[name](part).argmax(1) for part in test_volumes.split(4)])
    if monitor.latest:
        print(monitor)
    scores[name] = [dice(found[name], test_labels, label) for label in (1, 2)]

# %%
# Which one wins
# --------------

print(f"Dice overlap on {len(test_volumes)} patches of the front half, one seed")
print(f"{'network':12}  parameters  grey matter  white matter")
for name, (of_grey, of_white) in scores.items():
    count = sum(p.numel() for p in models[name].parameters())
    print(f"{name:12}  {count:10}  {of_grey:11.3f}  {of_white:12.3f}")
print(f"the better mean is that of the {max(scores, key=lambda name: mean(scores[name]))} network")

figure, axes = plt.subplots(2, 4, figsize=(9, 4.8), layout="constrained")
for row, axis in zip((0, 1), axes, strict=True):
    shown = {"input": test_volumes[row, 0], "truth": test_labels[row]} | {n: f[row] for n, f in found.items()}
    for (title, volume), panel in zip(shown.items(), axis, strict=True):
        panel.imshow(volume[:, :, PATCH // 2].numpy(), cmap="gray" if title == "input" else "viridis")
        panel.set_title(title, fontsize=9)
        panel.axis("off")
figure.suptitle("Slices of two patches of the front half", fontsize=10)
figure.savefig("brain_3d_slices.png")

# %%
# Where a voxel looks
# -------------------
#
# The samples of the middle voxel of the coarsest deformable layer, over slices of the patch through that voxel.

sampled = viz.sampling(models["deformable"], test_volumes[:1])
sampled.plot("position", layer="coarse.3").savefig("brain_3d_samples.png")
