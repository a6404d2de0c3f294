"""Find the clicks in recordings that are played at unknown speed, with 1-D deformable layers.

A click is a decaying tone. Its speed decides how far apart its crests are, so a kernel that can stretch fits them all.
"""

import torch
from torch import Tensor, nn

from deformkit.nn import PackedDeformConv1d


def recordings(count: int, length: int = 256) -> tuple[Tensor, Tensor]:
    """Noise with one click each, and where the click begins, in samples."""
    time = torch.arange(length).float()
    start = torch.randint(20, length - 80, (count, 1)).float()
    speed = torch.rand(count, 1) * 1.5 + 0.5
    since = (time - start).clamp(min=0) * speed
    click = (time >= start) * torch.exp(-since / 25) * torch.sin(since * 0.8)
    return (click + 0.25 * torch.randn(count, length)).unsqueeze(1), start.squeeze(1).long()


def network() -> nn.Sequential:
    """One score for each sample: does the click begin here?"""
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, padding="same"),
        nn.ReLU(),
        PackedDeformConv1d(16, 16, 9, padding="same", dilation=2, modulated=True),
        nn.ReLU(),
        PackedDeformConv1d(16, 16, 9, padding="same", dilation=4, modulated=True),
        nn.ReLU(),
        nn.Conv1d(16, 1, 1),
        nn.Flatten(),
    )


def main(steps: int = 100) -> None:
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        sound, start = recordings(32)
        loss = nn.functional.cross_entropy(model(sound), start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3d}  loss {loss:.3f}")

    sound, start = recordings(500)
    with torch.no_grad():
        found = model(sound).argmax(1)
        offset, _ = model[2].predict(model[:2](sound))
    print(f"{((found - start).abs() <= 2).float().mean():.0%} of the clicks found to within two samples")
    print(f"the taps of the first deformable layer move by {offset.abs().mean():.2f} samples on average")


if __name__ == "__main__":
    main()
