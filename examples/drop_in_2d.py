"""
A trained network made deformable (2-D)
=======================================

The second and the third convolution of a trained classifier of digits are replaced by deformable layers with the same
parameters. Their offsets start at zero, so that the accuracy stays the same, until both networks are trained further on
digits that are warped more than before.

The number of training steps of each part can be given as an argument: ``python drop_in_2d.py 20``.
"""

import copy
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import deformkit as dk
from deformkit import viz
from deformkit.demo import load_digits, warp
from deformkit.nn import PackedDeformConv2d

STEPS = int(sys.argv[1]) if sys.argv[1:] else 600
torch.manual_seed(0)

# %%
# A plain network
# ---------------
#
# It is trained on upright digits.

data = load_digits(seed=0)
plain = nn.Sequential(
    nn.Conv2d(1, 16, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
)


def train(model: nn.Module, groups: list, warped: bool) -> list[float]:
    """Train on digits; return the losses."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(groups)
    losses = []
    for step in range(STEPS):
        chosen = torch.randint(len(data.train_labels), (50,), generator=generator)
        images = data.train_images[chosen]
        loss = F.cross_entropy(model(warp(images, generator) if warped else images), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"    step {step:3d}  loss {loss:.3f}", flush=True)
    return losses


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The accuracy on warped digits that are held out."""
    return (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


print("plain network, upright digits", flush=True)
train(plain, [{"params": plain.parameters(), "lr": 3e-3}], warped=False)

# %%
# The same network, deformable
# ----------------------------
#
# ``strict=False`` leaves the offset heads, which the plain layers do not have, at zero.


def deformable(conv: nn.Conv2d) -> PackedDeformConv2d:
    """A modulated deformable layer with the parameters of ``conv``."""
    layer = PackedDeformConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        modulated=True,
    )
    layer.load_state_dict(conv.state_dict(), strict=False)
    return layer


changed = copy.deepcopy(plain)
changed[2], changed[4] = deformable(plain[2]), deformable(plain[4])
with torch.no_grad():
    difference = (changed(data.test_images) - plain(data.test_images)).abs().max()
print(f"largest change of the output by the replacement: {difference:.1e}")

# %%
# Training further
# ----------------
#
# Offset heads learn at a third of the learning rate of the others.

before = accuracy(plain)
print("plain network, warped digits", flush=True)
curves = {"plain": train(plain, [{"params": plain.parameters(), "lr": 3e-3}], warped=True)}
print("deformable network, warped digits", flush=True)
with dk.monitor(changed) as monitor:
    curves["deformable"] = train(changed, dk.param_groups(changed, 3e-3, offset_lr_mult=0.3), warped=True)
print(monitor)

scores = {"plain": accuracy(plain), "deformable": accuracy(changed)}
print(f"accuracy on {len(data.test_labels)} warped test digits, one seed: {before:.1%} before")
for name, score in scores.items():
    print(f"{name:12}  {score:.1%}")
print(f"the better one is the {max(scores, key=scores.get)} network")

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, losses in curves.items():
    axis.plot(torch.tensor(losses).unfold(0, min(20, STEPS), 1).mean(1), label=name)
axis.set(xlabel="step", ylabel="loss, mean of 20 steps")
axis.legend()
figure.savefig("drop_in_2d_loss.png")

# %%
# Where the last layer looks
# --------------------------

sampled = viz.sampling(changed, data.test_images[:1])
sampled.plot("position", layer="4").savefig("drop_in_2d_samples.png")
