"""How each operator is divided among the ranks of a mesh axis: its sharding rules, by the axes of its arguments.

A rule of the forward operator determines the one of its backward. Where an argument is divided, so is its gradient;
where every rank has the whole argument, each computes a summand of its gradient.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from ..ops.deform_roi_pool.reference import cells_of


class Rule(NamedTuple):
    """One way to divide an operator.

    Attributes:
        places: the axis along which an argument is divided; every rank has the whole of the others.
        output: the axis along which the output is divided, or None if each rank computes a summand of it.
        counts: numbers of which every rank must have the same share, since its parts of several tensors end together.
        lengths: numbers of which every rank must have at least one.
    """

    places: Mapping[str, int]
    output: int | None
    counts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def fits(self, ranks: int) -> bool:
        """Whether so many ranks can take their parts, which are cut as by :func:`torch.chunk`."""
        return all(count % ranks == 0 for count in self.counts) and all(
            -(-length // -(-length // ranks)) == ranks for length in self.lengths
        )


Shapes = Mapping[str, Any]
"""The arguments of an operator by name; instead of a tensor its shape."""


def deform_conv(of: Shapes) -> list[Rule]:
    """Batch; output channels; groups; input channels, where the output is a sum over them."""
    channels, per_group = of["input"][1], of["weight"][1]
    groups = channels // per_group
    offset_groups = _offset_groups(of["offset"], of["weight"])
    rules = [Rule({"input": 0, "offset": 0, "mask": 0}, 0)]
    if groups == 1:
        rules.append(Rule({"weight": 0, "bias": 0}, 1, lengths=(of["weight"][0],)))
        if of["bias"] is None:
            rules.append(_by_channels({"input": 1, "weight": 1}, None, channels, offset_groups))
    else:
        rules.append(_by_channels({"input": 1, "weight": 0, "bias": 0}, 1, groups, offset_groups, groups))
    return rules


def deform_conv_transpose(of: Shapes) -> list[Rule]:
    """Batch; output channels, to which the offset groups belong; input channels, over which the output is a sum."""
    rules = [Rule({"input": 0, "offset": 0, "mask": 0}, 0)]
    if of["groups"] == 1:
        channels, out_channels = of["weight"][:2]
        rules.append(_by_channels({"weight": 1}, 1, out_channels, _offset_groups(of["offset"], of["weight"])))
        rules.append(Rule({"input": 1, "weight": 0}, None, lengths=(channels,)))
    return rules


def deform_aggregate(of: Shapes) -> list[Rule]:
    """Batch; heads; channels of a head."""
    last = len(of["value"]) - 1
    return [
        Rule({"value": 0, "offset": 0, "weight": 0}, 0),
        Rule({"value": last - 1, "offset": last - 1, "weight": last - 1}, last - 1, lengths=(of["value"][last - 1],)),
        Rule({"value": last}, last, lengths=(of["value"][last],)),
    ]


def ms_deform_attn(of: Shapes) -> list[Rule]:
    """Batch; heads; queries."""
    return [
        Rule({"value": 0, "sampling_locations": 0, "attention_weights": 0}, 0),
        Rule({"value": 2, "sampling_locations": 2, "attention_weights": 2}, 2, (of["value"][2],)),
        Rule({"sampling_locations": 1, "attention_weights": 1}, 1),
    ]


def deform_correlate(of: Shapes) -> list[Rule]:
    """Batch; heads; queries."""
    return [
        Rule({"query": 0, "key": 0, "sampling_locations": 0}, 0),
        Rule({"query": 2, "key": 2, "sampling_locations": 2}, 2, (of["key"][2],)),
        Rule({"query": 1, "sampling_locations": 1}, 1),
    ]


def deform_sample(of: Shapes) -> list[Rule]:
    """Batch; groups or channels; points."""
    return [
        Rule({"input": 0, "points": 0}, 0),
        _by_groups(of),
        Rule({"points": 2}, 2),
    ]


def deform_splat(of: Shapes) -> list[Rule]:
    """Batch; groups or channels; points, over which the output is a sum."""
    return [
        Rule({"input": 0, "points": 0}, 0),
        _by_groups(of),
        Rule({"input": 2, "points": 2}, None),
    ]


def deform_roi_pool(of: Shapes) -> list[Rule]:
    """RoIs; channels, each with those of all cells of a RoI."""
    cells = cells_of(of["group_size"])
    counts = (of["input"][1] // prod(cells),) if cells else ()
    return [Rule({"rois": 0, "offset": 0}, 0), Rule({"input": 1}, 1, counts)]


RULES: dict[str, Callable[[Shapes], list[Rule]]] = {
    function.__name__: function
    for function in (
        deform_conv,
        deform_conv_transpose,
        deform_aggregate,
        ms_deform_attn,
        deform_correlate,
        deform_sample,
        deform_splat,
        deform_roi_pool,
    )
}


def _offset_groups(offset: Any, weight: Any) -> int:
    axes = len(weight) - 2
    return int(offset[1] // (prod(weight[2:]) * axes))


def _by_channels(places: dict[str, int], output: int | None, length: int, offset_groups: int, *counts: int) -> Rule:
    """Channels divided together with their offset groups, or with the one of all channels."""
    if offset_groups == 1:
        return Rule(places, output, counts, (length,))
    return Rule({**places, "offset": 1, "mask": 1}, output, (*counts, offset_groups))


def _by_groups(of: Shapes) -> Rule:
    """Channels divided together with the points of their groups, or with the one group of all channels."""
    groups = of["points"][1]
    return (
        Rule({"input": 1, "points": 1}, 1, (groups,)) if groups > 1 else Rule({"input": 1}, 1, lengths=of["input"][1:2])
    )
