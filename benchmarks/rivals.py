"""Everything that can answer the same call, behind one adapter.

An adapter takes a case and its arguments and returns a :class:`Call` in the rival's own layout, so that no conversion
is timed; or it raises :class:`Unfit`, with the reason.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deformkit import bench
from deformkit.ops import deform_conv
from deformkit.ops._library import operators


class Unfit(Exception):
    """The rival cannot answer this call."""


@dataclass
class Call:
    run: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    """What the rival differentiates by, under the names of our arguments."""
    layout: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient
    """A gradient in the rival's layout, turned into ours."""

    def forward(self) -> Callable[[], object]:
        return bench.without_gradients(self.run)

    def both(self) -> Callable[[], object]:
        return bench.with_gradients(self.run, list(self.leaves.values()))

    def evaluate(self, cotangent: Tensor) -> dict[str, Tensor]:
        output = self.run()
        grads = torch.autograd.grad(output, list(self.leaves.values()), cotangent.to(output))
        named = zip(self.leaves, grads, strict=True)
        return {"output": output.detach(), **{name: self.layout(name, grad) for name, grad in named}}


def ours(case: Any, arguments: dict[str, Any]) -> Call:
    function = (deform_conv.deform_conv1d, deform_conv.deform_conv2d, deform_conv.deform_conv3d)[case.axes - 1]
    arguments, leaves = differentiable(arguments)
    return Call(lambda: function(**arguments), leaves)


def reference(case: Any, arguments: dict[str, Any]) -> Call:
    arguments, leaves = differentiable(arguments)
    values = list(arguments.values())
    return Call(lambda: operators["deform_conv"].reference(*values), leaves)


def compiled_reference(case: Any, arguments: dict[str, Any]) -> Call:
    arguments, leaves = differentiable(arguments)
    values = list(arguments.values())
    torch.compiler.reset()
    function = torch.compile(operators["deform_conv"].reference, dynamic=False)
    return Call(lambda: function(*values), leaves)


def plain(case: Any, arguments: dict[str, Any]) -> Call:
    """Not the same result: the convolution of the same shape, as a yardstick."""
    arguments, leaves = differentiable(arguments)
    return Call(
        lambda: bench.plain_convolution(**arguments),
        {name: leaf for name, leaf in leaves.items() if name in ("input", "weight", "bias")},
    )


def torchvision(case: Any, arguments: dict[str, Any]) -> Call:
    from torchvision.ops import deform_conv2d

    if case.axes != 2:
        raise Unfit("2-D only")
    if arguments["boundary"] != "zeros":
        raise Unfit("zeros only")
    if arguments["input"].dtype not in (torch.float32, torch.float64):
        raise Unfit("no half precision on a CPU")
    arguments, leaves = differentiable(arguments)
    del arguments["boundary"]
    return Call(lambda: deform_conv2d(**arguments), leaves)


def dc1d(case: Any, arguments: dict[str, Any]) -> Call:
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
    arguments, leaves = differentiable(arguments)
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


def differentiable(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments with tensors of their own, and those tensors."""
    leaves = {
        name: value.detach().clone().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)
    }
    return {**arguments, **leaves}, leaves


OURS, PLAIN = "deformkit", "plain"
RIVALS: dict[str, Callable[[Any, dict[str, Any]], Call]] = {
    OURS: ours,
    PLAIN: plain,
    "torchvision": torchvision,
    "dc1d": dc1d,
    "reference": reference,
    "compiled": compiled_reference,
}
ABSENT = [name for name in ("torchvision", "dc1d") if importlib.util.find_spec(name) is None]
