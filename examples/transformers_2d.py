"""
A detector of transformers, patched and timed (2-D)
===================================================

A Deformable DETR of transformers is built with random weights, which is enough to time it, and run on a photograph that
ships with scikit-learn. The plain network of this page is the same model before :func:`deformkit.patch`: both compute
the same, so that only time differs.

The number of timed runs of each can be given as an argument: ``python transformers_2d.py 1``. Fewer than two runs use a
smaller photograph.
"""

import sys
import time
from statistics import median

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

import deformkit as dk
from deformkit import viz

RUNS = int(sys.argv[1]) if sys.argv[1:] else 5
SIZE = (416, 640) if RUNS > 1 else (104, 160)

# %%
# The photograph and the model
# ----------------------------
#
# Six encoder and six decoder layers, 300 queries, and four levels, three of which a ResNet-50 computes.

photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).movedim(-1, 0).float()[None] / 255
photograph = F.interpolate(photograph, SIZE, mode="bilinear", antialias=True)
torch.manual_seed(0)
backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
config = DeformableDetrConfig(
    backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None
)
model = DeformableDetrForObjectDetection(config).eval()
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {list(photograph.shape)} pixels")

# %%
# Before and after
# ----------------
#
# A first run of each is not counted. ``model.model`` is the part with the layers; its output is compared.


@torch.no_grad()
def timed(model: nn.Module) -> tuple[list[float], torch.Tensor]:
    """The seconds of each run, and the hidden states of the last decoder layer."""
    seconds = []
    for run in range(RUNS + 1):
        start = time.perf_counter()
        output = model(pixel_values=photograph)
        seconds.append(time.perf_counter() - start)
        print(f"    run {run}: {seconds[-1]:.2f} s", flush=True)
    return seconds[1:], output.last_hidden_state


print("transformers' own layers", flush=True)
before, expected = timed(model)
done = dk.patch(model)
print(done, flush=True)
after, actual = timed(model)

difference = (actual - expected).abs().max() / expected.abs().max()
print(
    f"median of {RUNS} runs on {torch.get_num_threads()} threads: {median(before):.2f} s before, "
    f"{median(after):.2f} s after"
)
print(
    f"the patched model takes {median(after) / median(before):.2f} of the time; "
    f"largest relative difference {difference:.1e}"
)

figure, axis = plt.subplots(figsize=(5, 2), layout="constrained")
axis.barh(["before", "after"], [median(before), median(after)], color=["#9fb4c7", "#1f77b4"])
axis.plot(before + after, [0] * RUNS + [1] * RUNS, "|", color="black")
axis.invert_yaxis()
axis.set(xlabel="seconds per photograph; each run is a mark")
figure.savefig("transformers_2d_seconds.png")

# %%
# Where a pixel of the encoder looks
# ----------------------------------
#
# Offsets of a new model are those of its initialisation: each head looks in a direction of its own. A trained model can
# be passed in the same way.

sampled = viz.sampling(model, pixel_values=photograph)
print(f"{len(sampled)} deformable layers; the first is {sampled[0]}")
height, width = sampled[0].sizes[0]
sampled.plot("position", layer=0, at=(height // 2) * width + width // 2).savefig(
    "transformers_2d_samples.png", bbox_inches="tight"
)
