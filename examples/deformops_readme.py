"""The README of deformops with one import changed: a deformable layer and multi-scale attention, trained on a CPU."""

import torch
from torch import nn, randn

from deformkit.compat.deformops.nn import DeformAttn2d, DeformConv2d


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    dconv = DeformConv2d(16)
    x = randn((4, 16, 32, 64))
    y = dconv(x)
    print(f"{list(x.shape)} -> {list(y.shape)}")

    # It predicts its own offsets and learns to: here, to look one pixel to the left.
    optimizer = torch.optim.Adam(dconv.parameters(), lr=1e-2)
    target = x.roll(1, -1)
    for _ in range(steps):
        loss = nn.functional.mse_loss(dconv(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    offset, mask = dconv.predict(x)
    print(f"after {steps} steps: loss {loss:.3f}, offsets {list(offset.shape)}, masks {list(mask.shape)}")

    # Every query reads four points on each of two maps, around a place of its own.
    attention = DeformAttn2d(16, num_heads=4, num_levels=2)
    maps = [y, nn.functional.avg_pool2d(y, 2)]
    shapes = [(m.shape[2], m.shape[3]) for m in maps]
    pyramid = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
    queries, places = randn(4, 100, 16), torch.rand(4, 100, 2, 2)
    print(f"100 queries on maps {shapes}: {list(attention(queries, places, pyramid, shapes).shape)}")


if __name__ == "__main__":
    main()
