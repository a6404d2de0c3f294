"""Every implementation that can compute the same call, behind one adapter.

An adapter takes a case and its arguments and returns a :class:`Call` in the layout of that implementation, so that no
conversion is timed; or it raises :class:`Unfit` with the reason.
"""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit

from ..ops._operator import operators
from ..ops.deform_aggregate.reference import points
from .cases import operator
from .timing import with_gradients, without_gradients


class Unfit(Exception):
    """The implementation cannot compute this call."""


@dataclass
class Call:
    """One call of one implementation."""

    run: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    """The tensors to differentiate by, under the names of our arguments."""
    layout: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient
    """Turns the gradient of an argument from the layout of the implementation into ours."""

    def forward(self) -> Callable[[], object]:
        """The call without gradients."""
        return without_gradients(self.run)

    def both(self) -> Callable[[], object]:
        """The call and its backward."""
        return with_gradients(self.run, list(self.leaves.values()))

    def evaluate(self, cotangent: Tensor) -> dict[str, Tensor]:
        """The output and the gradients in our layout, by name."""
        output = self.run()
        grads = torch.autograd.grad(output, list(self.leaves.values()), cotangent.to(output))
        named = zip(self.leaves, grads, strict=True)
        return {"output": output.detach(), **{name: self.layout(name, grad) for name, grad in named}}


def ours(case: Any, arguments: dict[str, Any]) -> Call:
    """The public function."""
    name, axes = operator(case), case.axes
    arguments, leaves = differentiable(case, arguments)
    if "spatial_shapes" in arguments:
        flat = arguments["spatial_shapes"]
        arguments["spatial_shapes"] = [flat[i : i + axes] for i in range(0, len(flat), axes)]
    if "query" in arguments:
        arguments["query"] = arguments["query"].unflatten(2, (case.heads, case.channels))
    function = getattr(deformkit, f"{name}{axes}d" if "conv" in name else name)
    return Call(lambda: function(**arguments), leaves)


def reference(case: Any, arguments: dict[str, Any]) -> Call:
    """The reference implementation."""
    arguments, leaves = differentiable(case, arguments)
    values, function = operators[operator(case)].ordered(arguments), operators[operator(case)].reference
    return Call(lambda: function(*values), leaves)


def compiled_reference(case: Any, arguments: dict[str, Any]) -> Call:
    """The reference implementation in ``torch.compile``."""
    arguments, leaves = differentiable(case, arguments)
    values = operators[operator(case)].ordered(arguments)
    torch.compiler.reset()
    function = torch.compile(operators[operator(case)].reference, dynamic=False)
    return Call(lambda: function(*values), leaves)


def plain(case: Any, arguments: dict[str, Any]) -> Call:
    """The convolution of the same shape without deformation: another result, and a lower bound for the time."""
    arguments, leaves = differentiable(case, arguments)
    input, weight, bias = (arguments[name] for name in ("input", "weight", "bias"))
    steps = [arguments[name] for name in ("stride", "padding", "dilation")]
    function: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[case.axes - 1]
    return Call(
        lambda: function(input, weight, bias, *steps, case.groups),
        {name: leaf for name, leaf in leaves.items() if name in ("input", "weight", "bias")},
    )


def plain_transpose(case: Any, arguments: dict[str, Any]) -> Call:
    """The transposed convolution of the same shape without deformation, as :func:`plain`."""
    arguments, leaves = differentiable(case, arguments)
    input, weight = arguments["input"], arguments["weight"]
    steps = [arguments[name] for name in ("stride", "padding", "output_padding", "groups", "dilation")]
    function: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[case.axes - 1]
    return Call(
        lambda: function(input, weight, None, *steps),
        {name: leaf for name, leaf in leaves.items() if name in ("input", "weight")},
    )


def torchvision(case: Any, arguments: dict[str, Any]) -> Call:
    """``torchvision.ops.deform_conv2d``."""
    from torchvision.ops import deform_conv2d

    if case.axes != 2:
        raise Unfit("2-D only")
    if arguments["boundary"] != "zeros":
        raise Unfit("zeros only")
    if arguments["input"].device.type == "cpu" and arguments["input"].dtype not in (torch.float32, torch.float64):
        raise Unfit("no half precision on a CPU")
    arguments, leaves = differentiable(case, arguments)
    del arguments["boundary"]
    return Call(lambda: deform_conv2d(**arguments), leaves)


def mmcv_conv(case: Any, arguments: dict[str, Any]) -> Call:
    """``mmcv.ops.deform_conv2d``, or ``modulated_deform_conv2d`` with a mask."""
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    if case.axes != 2:
        raise Unfit("2-D only")
    if arguments["boundary"] != "zeros":
        raise Unfit("zeros only")
    if arguments["mask"] is None and arguments["bias"] is not None:
        raise Unfit("no bias without a mask")
    arguments, leaves = differentiable(case, arguments)
    tensors = [arguments[name] for name in ("input", "offset", "mask", "weight", "bias")]
    window = [arguments[name] for name in ("stride", "padding", "dilation")]
    if arguments["mask"] is not None:
        return Call(lambda: modulated_deform_conv2d(*tensors, *window, case.groups, case.offset_groups), leaves)
    input, offset, _, weight, _ = tensors
    return Call(lambda: deform_conv2d(input, offset, weight, *window, case.groups, case.offset_groups), leaves)


def mmcv_attention(case: Any, arguments: dict[str, Any]) -> Call:
    """The function of mmcv in operations of torch, which mmcv uses on a CPU."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    if arguments["value"].device.type != "cpu":
        raise Unfit("on a CPU only")
    return _of_levels(case, arguments, lambda *args: multi_scale_deformable_attn_pytorch(*args))


def dc1d(case: Any, arguments: dict[str, Any]) -> Call:
    """The layer of the package dc1d."""
    from dc1d.nn import DeformConv1d

    if case.axes != 1:
        raise Unfit("1-D only")
    # It pads with zeros and clamps into what it padded, which is the same as zeros if there is any padding.
    if arguments["boundary"] != "zeros" or arguments["padding"][0] < 1:
        raise Unfit("clamps at the border")
    (taps,) = case.kernel_size
    arguments = dict(arguments)
    for name in ("offset", "mask"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].unflatten(1, (-1, taps)).transpose(2, 3).contiguous()
    arguments, leaves = differentiable(case, arguments)
    layer = DeformConv1d(
        case.channels,
        case.out_channels,
        taps,
        stride=arguments["stride"][0],
        padding=arguments["padding"][0],
        dilation=arguments["dilation"][0],
        groups=case.groups,
        bias=case.bias,
        padding_mode="zeros",
        unconstrained=True,
    )
    for name in ("weight", "bias"):
        if name in leaves:
            leaves[name] = torch.nn.Parameter(leaves[name].detach())
            setattr(layer, name, leaves[name])

    def layout(name: str, gradient: Tensor) -> Tensor:
        return gradient.transpose(2, 3).flatten(1, 2) if name in ("offset", "mask") else gradient

    return Call(lambda: layer(arguments["input"], arguments["offset"], arguments["mask"]), leaves, layout)


def transformers(case: Any, arguments: dict[str, Any]) -> Call:
    """The attention module of Deformable DETR in transformers."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    core = MultiScaleDeformableAttention()

    def run(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # Its last argument, a block size, is for its CUDA kernel.
        return core(value, shapes, list(case.sizes), starts, locations, weights, 64)

    starts = F.pad(torch.tensor(case.sizes).prod(1).cumsum(0)[:-1], (1, 0)).to(arguments["value"].device)
    return _of_levels(case, arguments, run)


def _of_levels(case: Any, arguments: dict[str, Any], run: Callable[..., Tensor]) -> Call:
    """``run(value, spatial_shapes, locations, weights)`` with as many points on every level."""
    if case.axes != 2:
        raise Unfit("2-D only")
    if arguments["mode"] != "linear" or len(set(case.points)) > 1:
        raise Unfit("linear, as many points on every level")
    arguments = dict(arguments)
    for name in ("sampling_locations", "attention_weights"):
        arguments[name] = arguments[name].unflatten(3, (len(case.sizes), case.points[0]))
    arguments, leaves = differentiable(case, arguments)
    value, locations, weights = leaves.values()
    shapes = torch.tensor(case.sizes, device=value.device)

    def layout(name: str, gradient: Tensor) -> Tensor:
        return gradient if name == "value" else gradient.flatten(3, 4)

    return Call(lambda: run(value, shapes, locations, weights), leaves, layout)


def grid_sample(case: Any, arguments: dict[str, Any]) -> Call:
    """One call of ``grid_sample``: every head is an image of its own, and each position a row of its taps."""
    if case.axes != 2:
        raise Unfit("2-D only")
    arguments, leaves = differentiable(case, arguments)
    value, offset, weight = leaves.values()
    window = [arguments[n] for n in ("kernel_size", "stride", "padding", "dilation", "offset_scale", "remove_center")]
    extent = torch.tensor(case.size[::-1], dtype=value.dtype, device=value.device)

    def run() -> Tensor:
        batch, *_, heads, channels = value.shape
        base, shift = points(offset, *window)
        grid = ((base + shift).flip(-1) * 2 + 1) / extent - 1
        images = value.permute(0, 3, 4, 1, 2).flatten(0, 1)
        rows = grid.movedim(3, 1).flatten(2, 3).flatten(0, 1)
        samples = F.grid_sample(images, rows, padding_mode=case.boundary, align_corners=False)
        sums = (samples * weight.movedim(3, 1).flatten(2, 3).flatten(0, 1).unsqueeze(1)).sum(-1)
        return sums.reshape(batch, heads, channels, *weight.shape[1:3]).permute(0, 3, 4, 1, 2).contiguous()

    return Call(run, leaves)


def sampled_then_multiplied(case: Any, arguments: dict[str, Any]) -> Call:
    """A call of ``grid_sample`` for each level, whose samples are multiplied by the query and added up."""
    if case.axes != 2 or case.mode != "linear":
        raise Unfit("2-D, linear only")
    arguments, leaves = differentiable(case, arguments)
    query, key, locations = leaves.values()

    def run() -> Tensor:
        batch, _queries, heads = locations.shape[:3]
        levels = key.split([height * width for height, width in case.sizes], 1)
        products = []
        for size, level, part in zip(case.sizes, levels, locations.split(list(case.points), 3), strict=True):
            images = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)
            grid = 2 * part.transpose(1, 2).flatten(0, 1) - 1
            samples = F.grid_sample(images, grid, align_corners=False)
            vectors = query.unflatten(2, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
            products.append((samples * vectors.unsqueeze(-1)).sum(1).unflatten(0, (batch, heads)).transpose(1, 2))
        return torch.cat(products, -1)

    return Call(run, leaves)


def grid_sample_of_groups(case: Any, arguments: dict[str, Any]) -> Call:
    """One call of ``grid_sample``: the groups are images of their own."""
    if case.axes == 1:
        raise Unfit("two or three axes only")
    if case.mode != "linear":
        raise Unfit("mode linear only")
    mode = {"zeros": "zeros", "border": "border", "reflect": "reflection"}[case.boundary]
    arguments, leaves = differentiable(case, arguments)
    input, points = leaves.values()
    size = torch.tensor(case.size, dtype=points.dtype, device=points.device)

    def run() -> Tensor:
        images = input.unflatten(1, (case.groups, -1)).flatten(0, 1)
        grid = ((2 * points.flatten(0, 1) + 1) / size - 1).flip(-1)
        samples = F.grid_sample(images, grid.to(images.dtype), padding_mode=mode, align_corners=False)
        return samples.unflatten(0, (-1, case.groups)).flatten(1, 2)

    return Call(run, leaves)


def index_add(case: Any, arguments: dict[str, Any]) -> Call:
    """A call of ``index_add`` for each corner of the cells, over all images and groups at once."""
    if case.boundary != "zeros":
        raise Unfit("boundary zeros only")
    arguments, leaves = differentiable(case, arguments)
    input, points = leaves.values()
    size, owners = list(case.size), case.batch * case.groups

    def run() -> Tensor:
        place = points.flatten(0, 1).flatten(1, -2)
        fields = input.flatten(2).unflatten(1, (case.groups, -1)).flatten(0, 1)
        low = place.detach().floor()
        rows, first = fields.transpose(1, 2), torch.arange(owners, device=input.device).unsqueeze(1) * prod(size)
        total = input.new_zeros(owners * prod(size), rows.shape[2])
        for corner in product((0, 1), repeat=case.axes):
            pixel = low + torch.tensor(corner, device=input.device)
            extent = torch.tensor(size, device=input.device)
            inside = ((pixel >= 0) & (pixel < extent)).all(-1)
            weight = (1 - (place - pixel).abs()).prod(-1) * inside
            index = torch.zeros_like(inside, dtype=torch.int64)
            for axis, length in enumerate(size):
                index = index * length + pixel[..., axis].clamp(0, length - 1).long()
            total = total.index_add(0, (first + index).flatten(), (rows * weight.unsqueeze(-1)).flatten(0, 1))
        return total.unflatten(0, (owners, -1)).transpose(1, 2).reshape(case.batch, case.channels, *size)

    return Call(run, leaves)


def differentiable(case: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments with copies of those that have a gradient, and these copies."""
    described = operators[operator(case)]
    names = [described.arguments[i] for i in described.differentiable]
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if name in names and value is not None
    }
    return {**arguments, **leaves}, leaves


Adapter = Callable[[Any, dict[str, Any]], Call]
OURS, PLAIN = "deformkit", "plain"
DEFINITION: dict[str, Adapter] = {"reference": reference, "compiled": compiled_reference}
LIBRARIES: dict[str, dict[str, Adapter]] = {
    "deform_conv": {PLAIN: plain, "torchvision": torchvision, "mmcv": mmcv_conv, "dc1d": dc1d},
    "deform_conv_transpose": {PLAIN: plain_transpose},
    "deform_correlate": {"grid_sample": sampled_then_multiplied},
    "ms_deform_attn": {"transformers": transformers, "mmcv": mmcv_attention},
    "deform_aggregate": {"grid_sample": grid_sample},
    "deform_sample": {"grid_sample": grid_sample_of_groups},
    "deform_splat": {"index_add": index_add},
    "deform_roi_pool": {},
}
EVERYONE = list(dict.fromkeys([OURS, *(name for others in LIBRARIES.values() for name in others), *DEFINITION]))
PACKAGES = ("torchvision", "mmcv", "dc1d", "transformers")
ABSENT = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def rivals(case: Any, names: Collection[str]) -> dict[str, Adapter]:
    """Those of ``names`` that implement the operator of the case."""
    answering = {OURS: ours, **LIBRARIES[operator(case)], **DEFINITION}
    return {name: adapter for name, adapter in answering.items() if name in names}
