"""Draw the pictures of the page on ``deformkit.viz``; they are written beside this file.

Usage: python docs/viz/pictures.py
"""

from pathlib import Path

import torch
from torch import nn

import deformkit as dk
from deformkit import demo, viz

HERE = Path(__file__).parent


def trained() -> tuple[nn.Sequential, torch.Tensor]:
    """The demo's deformable network, trained for ten epochs, and a digit that it was not trained on."""
    data = demo.load_digits(seed=0)
    torch.manual_seed(0)
    result = demo.Result("deformable", demo.network(deformable=True))
    demo.train(result, data, 0, 10 * (len(data.train_images) // demo.BATCH), lambda loss: None)
    three = int((data.test_labels == 3).nonzero()[0])
    return result.network.eval(), data.test_images[three : three + 1]


def images() -> None:
    network, digit = trained()
    found = viz.sampling(network, digit)
    for what in ("position", "offsets", "receptive_field"):
        found.plot(what, layer="6", at=(4, 4)).savefig(HERE / f"{what}.png", dpi=100)


def attention() -> None:
    """Attention as it is initialised, over a photograph: one direction per head, one distance per point."""
    from sklearn.datasets import load_sample_image

    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).movedim(-1, 0)
    sizes = [(27, 40), (14, 20), (7, 10)]
    pixels = sum(h * w for h, w in sizes)
    centres = [
        torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
        for h, w in sizes
    ]
    reference = torch.cat([level.flatten(0, 1) for level in centres]).reshape(1, pixels, 1, 2).expand(-1, -1, 3, -1)
    torch.manual_seed(0)
    layer = dk.nn.MSDeformAttn(32, n_levels=3, n_heads=4, n_points=4)
    nn.init.normal_(layer.attention_weights.weight, std=0.2)
    features = torch.randn(1, pixels, 32)
    found = viz.sampling(layer, features, reference, features, sizes)
    # A photograph needs a fifth of the space that it takes as PNG.
    figure = found.plot("attention", at=13 * 40 + 20, image=photograph)
    figure.savefig(HERE / "attention.webp", dpi=100, pil_kwargs={"quality": 85, "method": 6})


def waveform() -> None:
    torch.manual_seed(0)
    time = torch.linspace(0, 1, 300)
    wave = (torch.sin(2 * torch.pi * (4 + 10 * time) * time) * torch.exp(-((time - 0.5) ** 2) / 0.1)).reshape(1, 1, -1)
    layer = dk.nn.PackedDeformConv1d(1, 4, 7, padding=24, dilation=8, modulated=True)
    nn.init.normal_(layer.offset_head.weight, std=3.0)
    viz.sampling(layer, wave).plot(at=150).savefig(HERE / "waveform.png", dpi=100)


def volume() -> None:
    torch.manual_seed(0)
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (20, 28, 28)), indexing="ij")
    ball = torch.sigmoid(20 * (0.7 - (x**2 + 1.6 * y**2 + z**2).sqrt())) * (1 + 0.3 * torch.cos(9 * x))
    layer = dk.nn.PackedDeformConv3d(1, 4, 3, padding=3, dilation=3)
    nn.init.normal_(layer.offset_head.weight, std=0.3)
    viz.sampling(layer, ball[None, None]).plot(at=(10, 14, 9)).savefig(HERE / "volume.png", dpi=100)


if __name__ == "__main__":
    images()
    attention()
    waveform()
    volume()
