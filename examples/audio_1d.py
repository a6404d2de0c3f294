"""
Clicks at unknown speed (1-D)
=============================

A click is a decaying tone in noise. Its speed decides how far apart its crests are, so that a kernel that can stretch
fits all clicks. Two networks find where the click begins: one with plain convolutions, one with deformable ones. The
sounds are made up, so that there are as many as needed.

The number of training steps can be given as an argument: ``python audio_1d.py 20``.
"""

import sys
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deformkit import viz
from deformkit.nn import PackedDeformConv1d

STEPS = int(sys.argv[1]) if sys.argv[1:] else 300

# %%
# The sounds
# ----------


def recordings(count: int, generator: torch.Generator, length: int = 256) -> tuple[Tensor, Tensor]:
    """Noise with one click each, ``[B, 1, length]``, and the sample at which the click begins."""
    time = torch.arange(length).float()
    start = torch.randint(20, length - 80, (count, 1), generator=generator).float()
    speed = torch.rand(count, 1, generator=generator) * 1.5 + 0.5
    since = (time - start).clamp(min=0) * speed
    click = (time >= start) * torch.exp(-since / 25) * torch.sin(since * 0.8)
    noise = 0.25 * torch.randn(count, length, generator=generator)
    return (click + noise).unsqueeze(1), start.squeeze(1).long()


# %%
# The networks
# ------------
#
# Each gives one score per sample: does the click begin here?


def network(layer: type[nn.Module], **options: bool) -> nn.Sequential:
    """Two layers of class ``layer`` between two plain convolutions."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, padding="same"),
        nn.ReLU(),
        layer(16, 16, 9, padding="same", dilation=2, **options),
        nn.ReLU(),
        layer(16, 16, 9, padding="same", dilation=4, **options),
        nn.ReLU(),
        nn.Conv1d(16, 1, 1),
        nn.Flatten(),
    )


def train(model: nn.Module) -> None:
    """Train a network on new sounds in each step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        sound, start = recordings(32, generator)
        loss = F.cross_entropy(model(sound), start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"    step {step:3d}  loss {loss:.3f}", flush=True)


# %%
# Which one wins
# --------------

sound, start = recordings(1000, torch.Generator().manual_seed(1000))
models, scores = {}, {}
for name, layer, options in (("plain", nn.Conv1d, {}), ("deformable", PackedDeformConv1d, {"modulated": True})):
    print(name, flush=True)
    torch.manual_seed(0)
    models[name] = network(layer, **options)
    began = time.perf_counter()
    train(models[name])
    with torch.no_grad():
        found = models[name](sound).argmax(1)
    scores[name] = ((found - start).abs() <= 2).float().mean().item()
    print(f"    trained in {time.perf_counter() - began:.1f} s", flush=True)

print(f"clicks found to within two samples, of {len(sound)} new sounds, one seed")
for name, score in scores.items():
    print(f"{name:12}  {sum(p.numel() for p in models[name].parameters()):6} parameters  {score:.1%}")
print(f"the better one is the {max(scores, key=scores.get)} network")

# %%
# Where the kernel looks
# ----------------------
#
# The samples of the second deformable layer for the position at which a click begins.

figure, axis = plt.subplots(figsize=(9, 2.4), layout="constrained")
axis.plot(sound[0, 0], color="#333333", linewidth=0.8)
axis.axvline(int(start[0]), color="#d62728", linestyle=":", label="the click begins")
axis.set(xlabel="sample", xlim=(0, sound.shape[-1] - 1))
axis.legend(fontsize=8)
figure.savefig("audio_1d_sound.png")

sampled = viz.sampling(models["deformable"], sound[:1])
sampled.plot("position", layer=1, at=int(start[0])).savefig("audio_1d_samples.png")
