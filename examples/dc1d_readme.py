"""The README of dc1d with one import changed: a deformable layer of dc1d's arguments, and what it costs beside Conv1d.

Offsets are given, one for each output position and tap. The README makes them for a layer without padding, 83 of them,
while its layer keeps all 128 positions; here they are made as many as the layer has.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deformkit.compat.dc1d.nn import DeformConv1d, PackedDeformConv1d


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What the second call returns, and how many seconds it took."""
    call()
    start = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size, length, kernel_size = 16, 128, 16
    window = {"stride": 1, "padding": "same", "dilation": 3, "groups": 1, "bias": True, "device": device}
    model = DeformConv1d(in_channels=512, out_channels=512, kernel_size=kernel_size, **window)
    plain = nn.Conv1d(512, 512, kernel_size, padding_mode="reflect", **window)
    plain.load_state_dict(model.state_dict())

    x = torch.rand(batch_size, 512, length, device=device, requires_grad=True)
    positions = model.expected_offset_positions(length)
    offsets = nn.Parameter(torch.ones(batch_size, 1, positions, kernel_size, device=device))
    y, deformable = timed(lambda: model(x, offsets))
    _, ordinary = timed(lambda: plain(x))
    print(f"{list(x.shape)} -> {list(y.shape)} with offsets {list(offsets.shape)}")
    print(f"deformable {1e3 * deformable:.0f} ms, plain {1e3 * ordinary:.0f} ms")
    y.mean().backward()
    print(f"norm of the gradient of the offsets: {offsets.grad.norm():.1e}")

    with torch.no_grad():
        difference = (model(x, torch.zeros_like(offsets)) - plain(x)).abs().max()
    print(f"largest difference from the plain layer at zero offsets: {difference:.1e}")

    # A layer that predicts its offsets, and learns to.
    packed = PackedDeformConv1d(16, 16, 5, padding="same", offset_groups=4, modulated=True, device=device)
    optimizer = torch.optim.Adam(packed.parameters(), lr=1e-2)
    sound = torch.randn(4, 16, 64, device=device)
    for _ in range(steps):
        loss = (packed(sound) - sound.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, (moved, mask) = packed(sound, with_offsets=True)
    print(f"after {steps} steps: loss {loss:.3f}, offsets {list(moved.shape)}, mask {list(mask.shape)}")


if __name__ == "__main__":
    main()
