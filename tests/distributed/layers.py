"""On several processes: layers divided by TensorParallel, against the same layers in one process."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ranks import report
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import deformkit as dk
import deformkit.distributed
from deformkit._testing import assert_close

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "MSDeformAttn": (
        lambda: dk.nn.MSDeformAttn(16, n_levels=2, n_heads=4, n_points=2),
        lambda: [torch.randn(2, 9, 16), torch.rand(2, 9, 2, 2), torch.randn(2, 54, 16), [(7, 6), (4, 3)]],
    ),
    "DCNv3": (lambda: dk.nn.DCNv3(16, group=4), lambda: [torch.randn(2, 7, 6, 16)]),
    "DCNv4": (lambda: dk.nn.DCNv4(16, group=4, center_feature_scale=True), lambda: [torch.randn(2, 7, 6, 16)]),
    "PackedDeformConv2d": (
        lambda: dk.nn.PackedDeformConv2d(6, 9, 3, padding=1, modulated=True),
        lambda: [torch.randn(2, 6, 7, 5)],
    ),
    "DeformConv1d": (
        lambda: dk.nn.DeformConv1d(4, 6, 3, padding=1),
        lambda: [torch.randn(2, 4, 9), torch.randn(2, 3, 9)],
    ),
    "PackedDeformConvTranspose3d": (
        lambda: dk.nn.PackedDeformConvTranspose3d(3, 4, 2, stride=2),
        lambda: [torch.randn(2, 3, 3, 2, 4)],
    ),
    "a model": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), dk.nn.PackedDeformConv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        lambda: [torch.randn(2, 3, 9, 9)],
    ),
}


def check(name: str, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    create, inputs = LAYERS[name]
    layer = create().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    args = [v.double().requires_grad_() if isinstance(v, Tensor) else v for v in inputs()]
    divided = copy.deepcopy(layer)
    parallelize_module(divided, mesh, deformkit.distributed.parallel_plan(divided))
    assert any(not p.placements[0].is_replicate() for p in divided.parameters() if isinstance(p, DTensor))
    tensors = [v for v in args if isinstance(v, Tensor)]
    results = []
    for module in (divided, layer):
        output = module(*args)
        assert type(output) is Tensor
        gradients = torch.autograd.grad(output.square().sum(), [*tensors, *module.parameters()])
        results.append([output, *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)])
    for i, (one, truth) in enumerate(zip(*results, strict=True)):
        assert_close(one, truth, name=f"result {i}")


def main() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report({name: partial(check, name, mesh) for name in LAYERS})


if __name__ == "__main__":
    main()
