"""Peak memory of one training step on a volume, for ``docs/volumes.md``: ``python benchmarks/volumes.py 96``.

Each figure comes from a separate process. It is the increase of its peak resident memory over the memory that is
resident when the module and the input exist and a smaller step has loaded the libraries. Linux only.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from memory import _SEPARATE_BLOCKS, MIB, _resident
from torch import nn

import deformkit as dk


class ByReference(dk.nn.PackedDeformConv3d):
    """The same layer on the reference implementation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        offset, _ = self.predict(input)
        steps = (self.stride, self.padding, self.dilation)
        return dk.reference.deform_conv(input, offset, self.weight, self.bias, *steps, None, "zeros")


def unet(deformable: bool) -> nn.Module:
    from monai.networks.nets import UNet

    model = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2))
    if deformable:
        for name, old in list(model.named_modules()):
            if isinstance(old, nn.Conv3d) and old.in_channels == 32 and old.stride == (1, 1, 1):
                new = dk.nn.PackedDeformConv3d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)
                model.set_submodule(name, new)
    return model


MODULES = {
    "Conv3d": (lambda: nn.Conv3d(16, 16, 3, padding=1), 16),
    "PackedDeformConv3d": (lambda: dk.nn.PackedDeformConv3d(16, 16, 3, padding=1), 16),
    "reference": (lambda: ByReference(16, 16, 3, padding=1), 16),
    "UNet": (lambda: unet(False), 1),
    "UNet, deformable": (lambda: unet(True), 1),
}


def measure(name: str, size: int) -> int:
    make, channels = MODULES[name]
    module = make()

    def step(volume: torch.Tensor) -> None:
        module(volume).square().mean().backward()
        module.zero_grad(set_to_none=True)

    step(torch.randn(1, channels, 8, 8, 8))
    volume = torch.randn(1, channels, size, size, size)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step(volume)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        for each in MODULES:
            command = [sys.executable, __file__, each, sys.argv[1]]
            environment = {**os.environ, **_SEPARATE_BLOCKS}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            found = f"{int(done.stdout) // MIB} MiB" if done.returncode == 0 else f"failed: {done.stderr[-200:]}"
            print(f"{each}: {found}", flush=True)
