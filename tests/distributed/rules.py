"""On several processes: every operator divided by each of its rules, against the whole operator.

With the argument ``compiled`` every one of these calls is compiled, which takes minutes. Without it, one call of each
operator is, on four ranks of the convolution alone.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ranks import report
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor, init_device_mesh

from deformkit._testing import assert_close
from deformkit._testing.cases import operator
from deformkit.distributed._rules import RULES, Rule
from deformkit.ops._operator import Operator, operators
from deformkit.ops.deform_aggregate import cases as aggregate
from deformkit.ops.deform_conv import cases as conv
from deformkit.ops.deform_conv_transpose import cases as transpose
from deformkit.ops.deform_correlate import cases as correlate
from deformkit.ops.deform_roi_pool import cases as roi
from deformkit.ops.deform_sample import cases as sample
from deformkit.ops.deform_splat import cases as splat
from deformkit.ops.ms_deform_attn import cases as attn


def cases() -> Iterator[Any]:
    """Lengths that the number of ranks divides, and ones that it does not."""
    for axes in (1, 2, 3):
        size, small, kernel = (7, 6, 5)[:axes], (4, 3, 2)[:axes], (3, 2, 1)[:axes]
        levels = (size, small)
        yield conv.Case(f"{axes}d", 5, 6, size, 7, kernel)
        yield conv.Case(f"{axes}d groups", 3, 8, size, 12, kernel, groups=4, offset_groups=4, modulated=False)
        yield conv.Case(f"{axes}d offset groups", 2, 8, size, 5, kernel, offset_groups=4, bias=False)
        yield transpose.Case(f"{axes}d", 5, 6, small, 7, kernel, stride=2)
        yield transpose.Case(f"{axes}d offset groups", 2, 5, small, 8, kernel, offset_groups=4)
        yield transpose.Case(f"{axes}d groups", 4, 4, small, 8, kernel, groups=2, offset_groups=2)
        yield aggregate.Case(f"{axes}d", 5, size, 6, 7, kernel)
        yield attn.Case(f"{axes}d", 5, levels, 9, 4, 3, (2, 3))
        yield correlate.Case(f"{axes}d", 5, levels, 9, 4, 3, (2, 3))
        yield sample.Case(f"{axes}d", 5, 7, size, small)
        yield sample.Case(f"{axes}d groups", 3, 8, size, small, groups=4)
        yield splat.Case(f"{axes}d", 5, 7, small, size)
        yield splat.Case(f"{axes}d groups", 3, 8, small, size, groups=4)
        yield roi.Case(f"{axes}d", 2, 7, size, 9, small)
        yield roi.Case(f"{axes}d cells", 2, 4, size, 9, small, group_size=(2,) * axes)


def rules(op: Operator, args: list[Any], ranks: int) -> Iterator[tuple[Rule, bool]]:
    """All rules, and one that divides the first argument where none does; and whether so many ranks can keep to it."""
    shapes = {
        name: list(value.shape) if isinstance(value, Tensor) else value
        for name, value in zip(op.arguments, args, strict=True)
    }
    for rule in RULES[op.name](shapes):
        lengths = [shapes[name][axis] for name, axis in rule.places.items() if shapes[name] is not None]
        yield rule, rule.fits(ranks) and min(lengths) >= ranks
    yield Rule({op.arguments[0]: args[0].dim() - 1}, 0), False


def distributed(args: list[Any], op: Operator, mesh: DeviceMesh, *rules: Rule) -> list[Any]:
    """The arguments, divided along each axis of the mesh by another rule."""

    def place(name: str) -> list[Placement]:
        return [Shard(rule.places[name]) if name in rule.places else Replicate() for rule in rules]

    return [
        distribute_tensor(value, mesh, place(name)).requires_grad_(i in op.differentiable)
        if isinstance(value, Tensor)
        else value
        for i, (name, value) in enumerate(zip(op.arguments, args, strict=True))
    ]


def check(
    op: Operator,
    args: list[Any],
    mesh: DeviceMesh,
    rules: list[Rule],
    are_kept: bool = True,
    compiled: bool = False,
) -> None:
    """Compare output and gradients; where the rules can be kept to, the output stays where they leave it."""
    call = op
    if compiled:
        torch.compiler.reset()
        call = torch.compile(op, fullgraph=True, backend="aot_eager")
    wanted = [i for i in op.differentiable if args[i] is not None]
    whole = [v.detach().requires_grad_(i in wanted) if isinstance(v, Tensor) else v for i, v in enumerate(args)]
    expected = op(*whole)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, [whole[i] for i in wanted], cotangent)

    parts = distributed(args, op, mesh, *rules)
    output = call(*parts)
    assert isinstance(output, DTensor)
    if are_kept:
        kept = tuple(Partial() if rule.output is None else Shard(rule.output) for rule in rules)
        assert output.placements == kept, f"placed {output.placements}, not {kept}"
    everywhere = distribute_tensor(cotangent, mesh, [Replicate() for _ in rules])
    found = torch.autograd.grad(output, [parts[i] for i in wanted], everywhere)
    assert_close(output.full_tensor(), expected, name="output")
    for i, one, truth in zip(wanted, found, gradients, strict=True):
        assert_close(one.full_tensor(), truth, name=f"gradient of {op.arguments[i]}")


def check_two_axes(mesh: DeviceMesh) -> None:
    """The batch along one axis of the mesh, heads along the other; and heads along both, of which there are enough."""
    op = operators["ms_deform_attn"]
    args = op.ordered(attn.Case("2d", 5, ((7, 6), (4, 3)), 9, 4, 3, (2, 3)).arguments(torch.float64))
    batch, heads, _ = RULES[op.name]({"value": list(args[0].shape)})
    check(op, args, mesh, [batch, heads])
    check(op, args, mesh, [heads, heads])
    args = op.ordered(attn.Case("2d", 5, ((7, 6), (4, 3)), 9, 2, 3, (2, 3)).arguments(torch.float64))
    check(op, args, mesh, [heads, heads], are_kept=False)


def check_options(mesh: DeviceMesh) -> None:
    """Two calls that differ in a list of ints have outputs of two shapes."""
    case = roi.Case("2d", 2, 7, (7, 6), 9, (7, 7), with_offset=False)
    op, shapes = operators["deform_roi_pool"], []
    for size in (7, 5):
        args = op.ordered({**case.arguments(torch.float64), "output_size": [size, size]})
        output = op(*distributed(args, op, mesh, Rule({"rois": 0}, 0)))
        shapes += [output.shape[2:], output.to_local().shape[2:]]
    assert [tuple(shape) for shape in shapes] == [(7, 7), (7, 7), (5, 5), (5, 5)], shapes


def main() -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    checks: dict[str, Callable[[], None]] = {"options": partial(check_options, mesh)}
    all_compiled = "compiled" in sys.argv
    if ranks == 4:
        checks["two axes"] = partial(check_two_axes, init_device_mesh("cpu", (2, 2)))
    for case in cases():
        # The rules divide the same axes of lines, planes and volumes, by two or by four.
        if (case.axes == 2) != (ranks == 2):
            continue
        op = operators[operator(case)]
        args = op.ordered(case.arguments(torch.float64))
        for rule, is_kept in rules(op, args, ranks):
            places = ", ".join(f"{name} {axis}" for name, axis in rule.places.items())
            one = partial(check, op, args, mesh, [rule], is_kept)
            checks[f"{op.name}, {case.name}: {places}"] = partial(one, compiled=all_compiled)
            if ranks == 2 or op.name == "deform_conv":
                checks.setdefault(f"{op.name}, compiled", partial(one, compiled=True))
    report(checks)


if __name__ == "__main__":
    main()
