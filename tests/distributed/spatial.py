"""On several processes: operators on images and volumes that are cut along an axis, against the whole ones."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ranks import report
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor, init_device_mesh
from traffic import Traffic

import deformkit as dk
from deformkit._testing import assert_close, assert_equal
from deformkit.distributed import (
    attention_traffic,
    spatial_deform_aggregate,
    spatial_deform_conv,
    spatial_deform_sample,
    spatial_ms_deform_attn,
)

SIZE = (11, 9, 10)


def compare(
    spatial: Callable[..., Tensor],
    whole: Callable[..., Tensor],
    tensors: list[Tensor],
    placements: list[list[Placement]],
    mesh: DeviceMesh,
) -> None:
    """Outputs and all gradients; tensors without placements are given to every rank as they are."""
    parts = [
        distribute_tensor(t, mesh, p).detach().requires_grad_() if p else t.detach().clone().requires_grad_()
        for t, p in zip(tensors, placements, strict=True)
    ]
    full = [t.detach().clone().requires_grad_() for t in tensors]
    output, expected = spatial(*parts), whole(*full)
    assert isinstance(output, DTensor) and output.shape == expected.shape, (output.shape, expected.shape)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(output, parts, distribute_tensor(cotangent, mesh, output.placements))
    truth = torch.autograd.grad(expected, full, cotangent)
    for i, (one, other) in enumerate(zip([output, *found], [expected, *truth], strict=True)):
        one = one.full_tensor() if isinstance(one, DTensor) else one
        nan = other.isnan()
        assert_equal(one.isnan(), nan)
        assert_close(one.nan_to_num(), other.nan_to_num(), name=f"result {i}")


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def conv(mesh: DeviceMesh, axes: int, cut: int, spread: float, options: dict[str, Any], nan: bool = False) -> None:
    torch.manual_seed(axes + cut)
    size, kernel = SIZE[:axes], (3, 2, 3)[:axes]
    taps = torch.Size(kernel).numel()
    steps = {name: options.get(name, 1 if name != "padding" else 0) for name in ("stride", "padding", "dilation")}
    out = [
        (s + 2 * steps["padding"] - steps["dilation"] * (k - 1) - 1) // steps["stride"] + 1
        for s, k in zip(size, kernel, strict=True)
    ]
    offset = normal(2, 2 * taps * axes, *out, scale=spread)
    if options.get("max_offset"):
        offset = offset.clamp(-options["max_offset"], options["max_offset"])
    if nan:
        offset[0, 3].flatten()[::5] = torch.nan
    tensors = [normal(2, 4, *size), offset, normal(3, 4, *kernel), normal(3), torch.rand(2, 2 * taps, *out).double()]
    along: list[Placement] = [Shard(2 + cut)]
    # Of a mesh of two axes the second has shares of the batch.
    placed = [[*along, Shard(0)] if mesh.ndim == 2 else along, [], [], [], []]
    everywhere: list[Placement] = [Replicate()] * mesh.ndim
    placed[1] = placed[4] = placed[0]
    placed[2] = everywhere
    plain = {name: value for name, value in options.items() if name != "max_offset"}
    function = getattr(dk, f"deform_conv{axes}d")
    compare(
        lambda x, o, w, b, m: spatial_deform_conv(x, o, w, b, mask=m, **options),
        lambda x, o, w, b, m: function(x, o, w, b, mask=m, **plain),
        tensors,
        placed,
        mesh,
    )


def aggregate(mesh: DeviceMesh, axes: int, cut: int, options: dict[str, Any], nan: bool = False) -> None:
    torch.manual_seed(axes + cut)
    size, kernel = SIZE[:axes], (3, 3, 1)[:axes]
    taps = torch.Size(kernel).numel() - options.get("remove_center", False)
    offset = normal(2, *size, 2, taps, axes, scale=options.get("max_offset", 2.0))
    if options.get("max_offset"):
        offset = offset.clamp(-options["max_offset"], options["max_offset"])
    if nan:
        offset.flatten()[::7] = torch.nan
    tensors = [normal(2, *size, 2, 3), offset, normal(2, *size, 2, taps)]
    padding = [k // 2 for k in kernel]
    plain = {name: value for name, value in options.items() if name != "max_offset"}
    compare(
        lambda v, o, w: spatial_deform_aggregate(v, o, w, kernel, padding=padding, **options),
        lambda v, o, w: dk.deform_aggregate(v, o, w, kernel, padding=padding, **plain),
        tensors,
        [[Shard(1 + cut)]] * 3,
        mesh,
    )


def sample(mesh: DeviceMesh, axes: int, cut: int, options: dict[str, Any], nan: bool = False) -> None:
    torch.manual_seed(axes + cut)
    size = SIZE[:axes]
    points = 1.4 * torch.rand(2, 2, 7, 3, axes).double() * torch.tensor(size) - 0.2 * torch.tensor(size)
    if nan:
        points.flatten()[::7] = torch.nan
    whole, spatial = partial(dk.deform_sample, **options), partial(spatial_deform_sample, **options)
    if options.get("mode") == "nearest":
        points = points.floor() + 0.25
    compare(spatial, whole, [normal(2, 4, *size), points], [[Shard(2 + cut)], [Shard(2)]], mesh)


def attention(mesh: DeviceMesh, axes: int, queries: int, divide: str, points: tuple[int, ...], mode: str) -> None:
    torch.manual_seed(axes)
    sizes = [(11, 9, 10)[:axes], (5, 3, 2)[:axes], (2, 2, 1)[:axes]]
    total = sum(torch.Size(size).numel() for size in sizes)
    places = 1.4 * torch.rand(2, queries, 2, sum(points), axes).double() - 0.2
    weights = torch.rand(2, queries, 2, sum(points)).double()
    options: dict[str, Any] = {"num_points": list(points), "mode": mode}
    compare(
        lambda v, p, w: spatial_ms_deform_attn(v, sizes, p, w, divide=divide, **options),
        lambda v, p, w: dk.ms_deform_attn(v, sizes, p, w, **options),
        [normal(2, total, 2, 3), places, weights],
        [[Shard(1)]] * 3,
        mesh,
    )


def moved_bytes(mesh: DeviceMesh) -> None:
    """The choice is the smallest of all, and the bytes are those that are moved."""
    for queries in (1, 5, 40, 900):
        sizes, points = [(16, 16), (8, 8), (2, 2)], [4, 4, 4]
        tensors = [normal(1, 324, 2, 8), torch.rand(1, queries, 2, 12, 2).double(), normal(1, queries, 2, 12)]
        value, places, weights = (distribute_tensor(t, mesh, [Shard(1)]) for t in tensors)
        found = {
            divide: attention_traffic(value, sizes, places, points, divide) for divide in ("auto", "gather", "shard")
        }
        assert found["auto"].total <= min(found["gather"].total, found["shard"].total), found
        for divide, expected in found.items():
            with Traffic() as traffic:
                spatial_ms_deform_attn(value, sizes, places, weights, num_points=points, divide=divide)
            counted = torch.tensor(traffic.sent["all-to-all"].bytes)
            dist.all_reduce(counted)
            assert counted == expected.total, (queries, divide, counted, expected)


def bounded(mesh: DeviceMesh, axes: int, cut: int, operator: str, farthest: float) -> tuple[Any, list[Tensor]]:
    """A call whose offsets along the axis that is cut are promised to be at most 2; one on the first rank is given."""
    torch.manual_seed(axes + cut)
    size, kernel, taps = SIZE[:axes], (3,) * axes, 3**axes
    if operator == "conv":
        offset = torch.rand(2, taps * axes, *size).double() * 4 - 2
        offset[0, cut].select(cut, 1).fill_(farthest)
        tensors, placed = [normal(2, 2, *size), offset], [Shard(2 + cut)]
        call = partial(spatial_deform_conv, weight=normal(2, 2, *kernel), padding=1, max_offset=2.0)
    else:
        offset = torch.rand(2, *size, 2, taps, axes).double() * 4 - 2
        offset[0].select(cut, 1)[..., cut] = farthest
        tensors, placed = [normal(2, *size, 2, 3), offset, normal(2, *size, 2, taps)], [Shard(1 + cut)]
        call = partial(spatial_deform_aggregate, kernel_size=kernel, padding=1, max_offset=2.0)
    return call, [distribute_tensor(t, mesh, placed).requires_grad_() for t in tensors]


def beyond(mesh: DeviceMesh, axes: int, cut: int, operator: str) -> None:
    """An offset that is promised is taken; on one rank the next larger number is an error on each."""
    call, parts = bounded(mesh, axes, cut, operator, -2.0)
    call(*parts)
    call, parts = bounded(mesh, axes, cut, operator, math.nextafter(-2.0, -3.0))
    try:
        call(*parts)
    except ValueError as error:
        assert "max_offset is 2.0" in str(error), error
    else:
        raise AssertionError("no error")


def compiled(mesh: DeviceMesh, axes: int, cut: int, operator: str) -> None:
    """With a bound the halo is known, and the whole call is one graph."""
    torch.compiler.reset()
    call, parts = bounded(mesh, axes, cut, operator, -2.0)
    function = torch.compile(lambda *args: call(*args).to_local(), fullgraph=True, backend="aot_eager")
    outputs = [function(*parts), call(*parts).to_local()]
    assert_close(*outputs)
    grads = [torch.autograd.grad(out.square().sum(), parts) for out in outputs]
    for one, truth in zip(*grads, strict=True):
        assert_close(one.full_tensor(), truth.full_tensor())


def main() -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    checks: dict[str, Callable[[], None]] = {
        "bytes": partial(moved_bytes, mesh),
    }
    grid: list[dict[str, Any]] = [
        {"padding": 1},
        {"padding": 1, "boundary": "border"},
        {"padding": 1, "boundary": "reflect"},
        {"padding": 2, "stride": 2, "dilation": 2},
        {"padding": 1, "max_offset": 1.5},
        {"padding": 1, "max_offset": 2.0, "boundary": "border", "stride": 2},
        {"padding": 1, "max_offset": 1.0, "boundary": "reflect"},
    ]
    # What two ranks have of their own, parts with one neighbour that are wider than a halo, planes show.
    for axes in (1, 3) if ranks == 4 else (2,):
        for divide in ("gather", "shard", "auto"):
            checks[f"attention {axes} {divide}"] = partial(attention, mesh, axes, 13, divide, (2, 3, 1), "linear")
        checks[f"attention {axes} few"] = partial(attention, mesh, axes, 3, "auto", (2, 0, 1), "linear")
        checks[f"attention {axes} nearest"] = partial(attention, mesh, axes, 13, "auto", (2, 3, 1), "nearest")
        for cut in range(axes):
            for operator in ("conv", "aggregate"):
                checks[f"beyond {axes} {cut} {operator}"] = partial(beyond, mesh, axes, cut, operator)
                if axes == 2 and cut == 1:
                    checks[f"compiled {axes} {operator}"] = partial(compiled, mesh, axes, cut, operator)
            for i, options in enumerate(grid):
                if axes == 3 and cut == 1 and i not in (0, 3):
                    continue
                for spread in (0.0, 2.0, 30.0) if i < 3 else (2.0,):
                    checks[f"conv {axes} {cut} {spread} {options}"] = partial(conv, mesh, axes, cut, spread, options)
            checks[f"conv {axes} {cut} nan"] = partial(conv, mesh, axes, cut, 2.0, {"padding": 1}, True)
            checks[f"aggregate {axes} {cut} nan"] = partial(aggregate, mesh, axes, cut, {}, True)
            checks[f"sample {axes} {cut} nan"] = partial(sample, mesh, axes, cut, {}, True)
            for more in (
                {},
                {"boundary": "border", "offset_scale": 0.7},
                {"remove_center": True, "max_offset": 1.5, "offset_scale": 1.3},
            ):
                checks[f"aggregate {axes} {cut} {more}"] = partial(aggregate, mesh, axes, cut, more)
            for more in ({}, {"boundary": "border"}, {"boundary": "reflect"}, {"mode": "nearest"}):
                checks[f"sample {axes} {cut} {more}"] = partial(sample, mesh, axes, cut, more)
    if ranks == 4:
        checks["two axes"] = partial(conv, init_device_mesh("cpu", (2, 2)), 2, 1, 2.0, {"padding": 1})
    report(checks)


if __name__ == "__main__":
    main()
