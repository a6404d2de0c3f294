"""Segment thin tubes that run in any direction through noisy volumes, with a 3-D deformable layer."""

import torch
from torch import Tensor, nn

from deformkit.nn import PackedDeformConv3d


def volumes(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy volumes ``[B, 1, D, H, W]`` with a straight tube in each, and which voxels belong to it."""
    line = torch.linspace(-1, 1, size)
    voxels = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    direction = nn.functional.normalize(torch.randn(count, 1, 1, 1, 3), dim=-1)
    away = voxels - 0.5 * (torch.rand(count, 1, 1, 1, 3) - 0.5)
    along = (away * direction).sum(-1, keepdim=True) * direction
    inside = (away - along).norm(dim=-1) < 0.17
    return (inside + 0.6 * torch.randn(inside.shape)).unsqueeze(1), inside.unsqueeze(1).float()


def network() -> nn.Sequential:
    """One logit for each voxel."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.ReLU(),
        PackedDeformConv3d(8, 8, 3, padding=2, dilation=2, modulated=True, boundary="border"),
        nn.ReLU(),
        nn.Conv3d(8, 1, 3, padding=1),
    )


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        volume, inside = volumes(4)
        loss = nn.functional.binary_cross_entropy_with_logits(model(volume), inside, pos_weight=torch.tensor(5.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss:.3f}")

    volume, inside = volumes(16)
    with torch.no_grad():
        found = (model(volume) > 0).float()
        offset, _ = model[2].predict(model[:2](volume))
    dice = 2 * (found * inside).sum() / (found.sum() + inside.sum())
    print(f"Dice overlap with the tubes {dice:.2f}")
    print(f"the points of the deformable layer move by {offset.abs().mean():.2f} voxels on average")


if __name__ == "__main__":
    main()
