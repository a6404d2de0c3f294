"""Make the last convolutions of a trained 2-D network deformable: its output stays the same until it is trained on."""

import torch
from torch import nn

from deformkit.nn import PackedDeformConv2d


def deformable(conv: nn.Conv2d) -> PackedDeformConv2d:
    """A modulated deformable layer with the parameters of ``conv``, and offsets that start at zero."""
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


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding="same"),
    )
    images = torch.randn(4, 3, 32, 32)
    before = model(images)
    model[2], model[4] = deformable(model[2]), deformable(model[4])
    print(f"largest change of the output: {(model(images) - before).abs().max():.1e}")

    # Offsets are in pixels and move everything behind them: their heads learn more slowly.
    heads = [p for name, p in model.named_parameters() if "offset_head" in name]
    others = [p for name, p in model.named_parameters() if "offset_head" not in name]
    optimizer = torch.optim.Adam([{"params": others}, {"params": heads, "lr": 1e-3}], lr=3e-3)
    target = before.detach().roll(1, -1)
    for _ in range(steps):
        loss = (model(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after {steps} steps: loss {loss:.4f}")
    offset, mask = model[4].predict(model[:4](images))
    where = model[4].sampling_locations(offset)
    print(f"points {list(where.shape)}, moved by up to {offset.abs().max():.2f} pixels; masks {list(mask.shape)}")


if __name__ == "__main__":
    main()
