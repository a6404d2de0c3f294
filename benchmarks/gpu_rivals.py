"""Other implementations for a GPU, as adapters of ``deformkit._testing.rivals``."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import Workload
from torch import Tensor
from torch.nn import functional as F

from deformkit._testing.rivals import Call, Unfit, compiled_reference, differentiable, ours

OURS = "deformkit"


def torchvision(case: Any, arguments: dict[str, Any]) -> Call:
    from torchvision.ops import deform_conv2d

    if case.axes != 2 or arguments["boundary"] != "zeros":
        raise Unfit("2-D with zeros outside only")
    if arguments["input"].dtype == torch.bfloat16:
        raise Unfit("no bfloat16")
    arguments, leaves = differentiable(case, arguments)
    del arguments["boundary"]
    return Call(lambda: deform_conv2d(**arguments), leaves)


def deformops_conv(case: Any, arguments: dict[str, Any]) -> Call:
    from deformops.registry import conv

    if case.axes != 2 or arguments["boundary"] != "zeros":
        raise Unfit("2-D with zeros outside only")
    groups, offset_groups, shape = case.groups, case.offset_groups, arguments["offset"].shape
    native = dict(arguments)
    native["input"] = arguments["input"].movedim(1, -1).contiguous()
    native["offset"] = arguments["offset"].unflatten(1, (offset_groups, -1, 2)).permute(0, 4, 5, 1, 2, 3).contiguous()
    if arguments["mask"] is not None:
        native["mask"] = arguments["mask"].unflatten(1, (offset_groups, -1)).permute(0, 3, 4, 1, 2).contiguous()
    native, leaves = differentiable(case, native)

    def run() -> Tensor:
        value, offset, weight = native["input"], native["offset"], native["weight"]
        steps = {name: tuple(native[name]) for name in ("stride", "padding", "dilation")}
        options = {"groups": groups, "offset_groups": offset_groups}
        return conv(value, offset, weight, native["bias"], native["mask"], **steps, **options).movedim(-1, 1)

    def layout(name: str, gradient: Tensor) -> Tensor:
        if name == "input":
            return gradient.movedim(-1, 1)
        if name == "offset":
            return gradient.permute(0, 3, 4, 5, 1, 2).reshape(shape)
        return gradient.permute(0, 3, 4, 1, 2).flatten(1, 2) if name == "mask" else gradient

    return Call(run, leaves, layout)


def deformops_attn(case: Any, arguments: dict[str, Any]) -> Call:
    """Its taps are in column-major order; offsets, x first, and weights are one tensor."""
    from deformops.registry import attn

    if case.axes != 2 or case.boundary != "zeros" or case.remove_center:
        raise Unfit("2-D with zeros outside and a centre only")
    rows, columns = case.kernel_size
    value = arguments["value"].flatten(-2).detach().clone().requires_grad_()
    points = torch.cat([arguments["offset"].flip(-1), arguments["weight"].unsqueeze(-1)], -1)
    turned = points.unflatten(-2, (rows, columns)).transpose(-3, -2).flatten(-4)
    leaves = {"value": value, "points": turned.contiguous().requires_grad_()}
    heads, channels = case.heads, case.channels
    names = ("kernel_size", "stride", "padding", "dilation")
    steps = {name: tuple(arguments[name]) for name in names}
    options = {"groups": heads, "group_dims": channels, "spread": case.offset_scale}

    def run() -> Tensor:
        return attn(leaves["value"], leaves["points"], **steps, **options).unflatten(-1, (heads, channels))

    def layout(name: str, gradient: Tensor) -> Tensor:
        if name == "value":
            return gradient.unflatten(-1, (heads, channels))
        return gradient.unflatten(-1, (heads, columns, rows, 3)).transpose(-3, -2).flatten(-3, -2)

    return _Packed(run, leaves, layout)


class _Packed(Call):
    """A call whose points are one tensor, of offsets, x first, and weights."""

    def evaluate(self, cotangent: Tensor) -> dict[str, Tensor]:
        found = super().evaluate(cotangent)
        points = found.pop("points")
        return {**found, "offset": points[..., :2].flip(-1), "weight": points[..., 2]}


def deformops_msda(case: Any, arguments: dict[str, Any]) -> Call:
    from deformops.registry import msda

    if case.axes != 2 or case.mode != "linear" or len(set(case.points)) > 1:
        raise Unfit("2-D, linear, as many points on every level only")
    arguments = dict(arguments)
    # It needs values and locations of one dtype.
    arguments["sampling_locations"] = arguments["sampling_locations"].to(arguments["value"].dtype)
    for name in ("sampling_locations", "attention_weights"):
        arguments[name] = arguments[name].unflatten(3, (len(case.sizes), case.points[0]))
    arguments, leaves = differentiable(case, arguments)
    value, locations, weights = leaves.values()
    shapes = torch.tensor(case.sizes, device=value.device)
    starts = F.pad(shapes.prod(1).cumsum(0)[:-1], (1, 0))

    def layout(name: str, gradient: Tensor) -> Tensor:
        return gradient if name == "value" else gradient.flatten(3, 4)

    def run() -> Tensor:
        return msda(value, shapes, starts, locations, weights).flatten(2)

    return Call(run, leaves, layout)


Adapter = Callable[[Any, dict[str, Any]], Call]
RIVALS: dict[str, dict[str, Adapter]] = {
    "deform_conv": {"torchvision": torchvision, "deformops": deformops_conv},
    "deform_aggregate": {"deformops": deformops_attn},
    "ms_deform_attn": {"deformops": deformops_msda},
    "deform_roi_pool": {},
    "deform_sample": {},
}
COMPILED = "compiled reference"
ABSENT = [name for name in ("torchvision", "deformops") if importlib.util.find_spec(name) is None]


def adapters(workload: Workload, compiled: bool) -> dict[str, Adapter]:
    """All implementations, deformkit first."""
    others = {name: adapter for name, adapter in RIVALS[workload.operator].items() if name not in ABSENT}
    return {OURS: ours, **others, **({COMPILED: compiled_reference} if compiled else {})}
