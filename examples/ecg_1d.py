"""
Waves of an electrocardiogram at any speed (1-D)
================================================

Each heartbeat has a small P wave, a sharp R peak and a rounded T wave. Two networks learn to mark the three in a noisy
recording that is played at 0.6 to 1.5 times its speed: one with plain convolutions, one whose kernels can stretch.

The recording is 10 seconds long, with 1000 samples per second, and ships with pydicom as test data. It belongs to one
person: the result says how the two networks compare on this recording, and nothing about other hearts.

The number of training steps can be given as an argument: ``python ecg_1d.py 100``.
"""

import sys
import time

import matplotlib.pyplot as plt
import torch
from pydicom import dcmread
from pydicom.data import get_testdata_file
from scipy.signal import butter, find_peaks, sosfiltfilt
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit import viz

STEPS = int(sys.argv[1]) if sys.argv[1:] else 600
SEEDS = range(3) if STEPS >= 100 else range(1)
RATE = 100  # samples per second after resampling
LENGTH = 256
WAVES = ("P", "R", "T")

# %%
# The recording
# -------------
#
# Lead II is filtered to 0.5 to 20 Hz to find the labels: R peaks are the highest peaks, and the highest point before
# and after each of them, within the usual distances, is its P and its T wave. The networks get the unfiltered lead.

recording = dcmread(get_testdata_file("waveform_ecg.dcm", download=False))
lead = recording.waveform_array(0)[:, 1].copy()
smooth = sosfiltfilt(butter(2, (0.5, 20), "bandpass", fs=1000, output="sos"), lead)
peaks, _ = find_peaks(smooth, height=0.5 * smooth.max(), distance=400)
peaks = [int(r) for r in peaks if r > 300 and r < len(smooth) - 450]
marks = {
    "P": [r - 250 + int(smooth[r - 250 : r - 80].argmax()) for r in peaks],
    "R": peaks,
    "T": [r + 150 + int(smooth[r + 150 : r + 450].argmax()) for r in peaks],
}

figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
axis.plot(lead, color="#9fb4c7", linewidth=0.8)
for wave, colour in zip(WAVES, ("#1f77b4", "#d62728", "#2ca02c"), strict=True):
    axis.plot(marks[wave], lead[marks[wave]], "o", color=colour, markersize=4, label=wave)
axis.axvspan(6000, len(lead), color="#fff0d5", label="held out")
axis.set(xlabel="milliseconds", ylabel="lead II, microvolts", xlim=(0, len(lead)))
figure.legend(ncols=4, fontsize=8, loc="outside upper center")
figure.savefig("ecg_1d_recording.png")

# %%
# Training windows
# ----------------
#
# A window begins at a random place, is stretched by a random factor and gets noise and a wandering baseline. The target
# of each wave is a bump of 40 milliseconds around its peak. The first six seconds are for training, the others for
# testing.

signal = torch.from_numpy((lead - lead.mean()) / lead.std()).float()
bumps = torch.zeros(len(WAVES), len(signal))
for row, wave in enumerate(WAVES):
    for peak in marks[wave]:
        near = torch.arange(len(signal)) - peak
        bumps[row] = torch.maximum(bumps[row], torch.exp(-((near / 20) ** 2)))


def windows(count: int, first: int, last: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows ``[B, 1, LENGTH]`` of the samples ``first`` to ``last``, and their targets ``[B, WAVES, LENGTH]``."""
    speed = 0.6 + 0.9 * torch.rand(count, 1, generator=generator)
    extent = LENGTH * 1000 / RATE * speed
    start = first + (last - first - 1 - extent) * torch.rand(count, 1, generator=generator)
    at = (start + extent * torch.linspace(0, 1, LENGTH)).long()
    time = torch.linspace(0, 6.28, LENGTH)
    phase, turns = 6.28 * torch.rand(count, 1, generator=generator), 3 * torch.rand(count, 1, generator=generator)
    wander = 0.5 * torch.sin(phase + turns * time)
    noise = 0.8 * torch.randn(count, LENGTH, generator=generator)
    return (signal[at] + wander + noise).unsqueeze(1), bumps[:, at].movedim(0, 1)


test_windows, test_targets = windows(300, 6000, len(signal), torch.Generator().manual_seed(1000))

# %%
# The networks
# ------------


def network(layer: type[nn.Module], **options: bool) -> nn.Sequential:
    """One logit per sample and wave, from two layers of class ``layer`` between two plain ones."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, padding="same"),
        nn.ReLU(),
        layer(16, 24, 9, padding="same", dilation=2, **options),
        nn.ReLU(),
        layer(24, 24, 9, padding="same", dilation=4, **options),
        nn.ReLU(),
        nn.Conv1d(24, len(WAVES), 9, padding="same"),
    )


NETWORKS = {
    "plain": lambda: network(nn.Conv1d),
    "deformable": lambda: network(dk.nn.PackedDeformConv1d, modulated=True),
}


def train(model: nn.Module, seed: int) -> None:
    """Train a network on windows of the first six seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(STEPS, 2))
    for step in range(STEPS):
        sounds, targets = windows(32, 0, 6000, generator)
        loss = F.binary_cross_entropy_with_logits(model(sounds), targets, pos_weight=torch.tensor(5.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"    step {step:4d}  loss {loss:.3f}", flush=True)


# %%
# Scores
# ------
#
# A peak of the output above 0.5 is right if a true peak of the same wave lies within 50 milliseconds and no other found
# peak took it. The F1 score is the harmonic mean of the share of true peaks that are found and the share of found peaks
# that are right.


def peaks_of(curves: Tensor) -> list[list[list[int]]]:
    """The peaks of each wave in each window."""
    return [[list(find_peaks(c.numpy(), height=0.5, distance=10)[0]) for c in window] for window in curves]


def f1(found: list[list[list[int]]], true: list[list[list[int]]], wave: int) -> float:
    """The F1 score of one wave, over all windows."""
    right = guesses = total = 0
    for f, t in zip(found, true, strict=True):
        waiting = list(t[wave])
        guesses, total = guesses + len(f[wave]), total + len(waiting)
        for peak in f[wave]:
            near = [w for w in waiting if abs(w - peak) <= RATE // 20]
            if near:
                waiting.remove(near[0])
                right += 1
    return 2 * right / max(guesses + total, 1)


true = peaks_of(test_targets)
models, scores = {}, {name: [] for name in NETWORKS}
for seed in SEEDS:
    for name, make in NETWORKS.items():
        print(f"{name}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        models[name] = make()
        start = time.perf_counter()
        train(models[name], seed)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            found = peaks_of(models[name](test_windows).sigmoid())
        scores[name].append([f1(found, true, wave) for wave in range(len(WAVES))])
        print(f"    trained in {seconds:.1f} s", flush=True)

print(f"F1 score on {len(test_windows)} held-out windows, mean of {len(SEEDS)} seeds")
print(f"{'network':12}  parameters  " + "  ".join(f"{wave:>6}" for wave in WAVES) + "    mean")
means = {}
for name, found in scores.items():
    by_wave = torch.tensor(found).mean(0)
    means[name] = by_wave.mean().item()
    count = sum(p.numel() for p in models[name].parameters())
    print(f"{name:12}  {count:10}  " + "  ".join(f"{x:6.1%}" for x in by_wave.tolist()) + f"  {means[name]:6.1%}")
print(f"the better mean is that of the {max(means, key=means.get)} network")

# %%
# Where the kernel looks
# ----------------------

with torch.no_grad():
    output = models["deformable"](test_windows[:1]).sigmoid()[0]
figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True, layout="constrained")
axes[0].plot(test_windows[0, 0], color="#333333", linewidth=0.8)
for row, wave in enumerate(WAVES):
    axes[1].plot(output[row], label=wave)
    axes[1].plot(test_targets[0, row], color="#999999", linestyle=":")
axes[0].set_title("A held-out window, and the output of the deformable network (true bumps dotted)", fontsize=10)
axes[1].set(xlabel="sample")
figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
figure.savefig("ecg_1d_output.png")

sampled = viz.sampling(models["deformable"], test_windows[:1])
sampled.plot("position", layer=-1).savefig("ecg_1d_samples.png")
