"""What a training step of each strategy communicates, how much memory a rank needs, and how long it takes at least."""

from collections.abc import Callable, Iterator
from math import ceil, floor, prod
from typing import Any, NamedTuple

from torch import nn

from .hardware import Hardware
from .operators import Cost, Layer, Step

_BUCKET, _FIRST_BUCKET = 25 * 2**20, 2**20


class Collective(NamedTuple):
    """Calls of one kind of a rank, the bytes of their whole tensors, and how many bytes a rank sends for them."""

    kind: str
    calls: int
    bytes: float
    sent: float


class Plan(NamedTuple):
    """A strategy on a number of GPUs.

    Attributes:
        strategy: its name.
        collectives: those of one step on the rank with most of them.
        memory: bytes of a rank by what they are for.
        compute: the least seconds of computation, at the figures of the data sheet.
        communication: the least seconds of communication.
        seconds: the least seconds of a step.
        samples: the samples of a step.
    """

    strategy: str
    collectives: list[Collective]
    memory: dict[str, float]
    compute: float
    communication: float
    seconds: float
    samples: int


class Setting(NamedTuple):
    """What all strategies are planned for.

    Attributes:
        model: the model.
        step: its step on one GPU.
        gpus: the number of GPUs.
        samples: samples in a step of one GPU.
        is_half: whether values are bfloat16; gradients and the optimizer stay float32.
        max_offset: how far offsets reach along the axis that is cut, in pixels.
        hardware: the GPU.
    """

    model: nn.Module
    step: Step
    gpus: int
    samples: int
    is_half: bool
    max_offset: float
    hardware: Hardware

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.step.itemsize // 2 if self.is_half else self.step.itemsize

    def parameters(self) -> int:
        """The number of all parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def weights(self) -> int:
        """Bytes of all parameters, and of all gradients."""
        return sum(p.nbytes for p in self.model.parameters())


def of(setting: Setting, kind: str, calls: int, size: float) -> Collective:
    """A collective, sent around a ring; of ``"send"`` and ``"all-to-all"`` all bytes go to others."""
    ring = (setting.gpus - 1) / setting.gpus
    factor = {"all-reduce": 2 * ring, "all-gather": ring, "reduce-scatter": ring}.get(kind, 1.0)
    return Collective(kind, calls, size, size * factor)


def ddp(setting: Setting) -> Iterator[Collective]:
    """The gradients are added up, in buckets."""
    size = setting.weights()
    yield of(setting, "all-reduce", 1 + ceil(max(size - _FIRST_BUCKET, 0) / _BUCKET), size)


def fsdp(setting: Setting) -> Iterator[Collective]:
    """Parameters are gathered for the forward and, but for the root, the backward; gradients are added and scattered.

    Every parameter is cut along its first axis, and filled up to a multiple of the ranks.
    """
    n, units = setting.gpus, fsdp_units(setting.model)
    inner = {id(p) for unit in units for p in unit.parameters()}
    of_root = [p for p in setting.model.parameters() if id(p) not in inner]

    def padded(parameters: list[nn.Parameter]) -> int:
        return sum(ceil(len(p) / n) * n * (p.nbytes // max(len(p), 1)) for p in parameters)

    root, others = padded(of_root), sum(padded(list(unit.parameters())) for unit in units)
    gathered = (root + 2 * others) / (2 if setting.is_half else 1)
    yield of(setting, "all-gather", bool(of_root) + 2 * len(units), gathered)
    yield of(setting, "reduce-scatter", bool(of_root) + len(units), root + others)


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` is applied to before the model itself: those in its outermost lists."""
    units: list[nn.Module] = []
    for child in model.children():
        found = list(child) if isinstance(child, nn.ModuleList) else fsdp_units(child)
        units += [unit for unit in found if any(True for _ in unit.parameters())]
    return units


def tensor(setting: Setting) -> Iterator[Collective]:
    """Of each divided layer, the outputs are added up or gathered, and the gradients of its inputs added up."""
    for layer in setting.step.layers:
        divides = next((rule for kind, rule in _TENSOR.items() if isinstance(layer.module, kind)), None)
        if divides is not None:
            yield from divides(setting, layer)


def spatial(setting: Setting) -> Iterator[Collective]:
    """Convolutions exchange rows with their neighbours; the gradients of all parameters are added up."""
    size = setting.weights()
    yield of(setting, "all-reduce", sum(1 for _ in setting.model.parameters()), size)
    sides = min(setting.gpus - 1, 2)
    for layer in setting.step.layers:
        module: Any = layer.module
        if not layer.inputs or not isinstance(layer.module, _CONVOLUTIONS):
            continue
        kernel, ((shape, wants_gradient), passes) = module.kernel_size[0], (layer.inputs[0], 1)
        passes += wants_gradient
        row = setting.itemsize * prod(shape) // shape[2]
        side = module.dilation[0] * (kernel - 1) / 2
        if isinstance(layer.module, _DEFORMABLE):
            reach = setting.max_offset
            rows = side + ceil(reach) + side + floor(reach) + 1
            yield of(setting, "all-gather", 1, 16 * setting.gpus)
            # What is received in the forward is sent back in the backward: with one neighbour, half of each.
            yield of(setting, "all-to-all", passes, passes * row * rows * sides / 2)
        elif kernel > 1:
            yield of(setting, "send", passes * sides, passes * row * side * sides)


def _plain_rules() -> tuple[tuple[type[nn.Module], ...], tuple[type[nn.Module], ...]]:
    from ..nn.deform_conv import _DeformConv

    return (nn.Conv1d, nn.Conv2d, nn.Conv3d, _DeformConv), (_DeformConv,)


_CONVOLUTIONS, _DEFORMABLE = _plain_rules()


def _heads(module: Any) -> int:
    return int(module.n_heads if hasattr(module, "n_heads") else module.group)


def _of_heads(setting: Setting, layer: Layer) -> Iterator[Collective]:
    """The summands of the output, and of the gradient of every input."""
    if _heads(layer.module) % setting.gpus:
        return
    sizes = [setting.itemsize * prod(shape) for shape, wants_gradient in layer.inputs if wants_gradient]
    output = setting.itemsize * prod(layer.output)
    yield of(setting, "all-reduce", 1 + len(sizes), output + sum(sizes))


def _of_dcnv3(setting: Setting, layer: Layer) -> Iterator[Collective]:
    """The gradient of the depthwise convolution, which predicts offsets, as well."""
    yield from _of_heads(setting, layer)
    if _heads(layer.module) % setting.gpus == 0:
        yield of(setting, "all-reduce", 1, setting.itemsize * prod(layer.output))


def _of_dcnv4(setting: Setting, layer: Layer) -> Iterator[Collective]:
    """The gradients of offsets and weights, which every rank predicts for all heads."""
    yield from _of_heads(setting, layer)
    if _heads(layer.module) % setting.gpus == 0:
        channels = layer.module.group * prod(layer.module.kernel_size) * (layer.module.spatial_dims + 1)
        yield of(setting, "all-gather", 1, setting.itemsize * prod(layer.output) // layer.output[-1] * channels)


def _of_convolution(setting: Setting, layer: Layer) -> Iterator[Collective]:
    if layer.module.out_channels < setting.gpus:
        return
    output = setting.itemsize * prod(layer.output)
    yield of(setting, "all-gather", 1, output)
    taps = prod(layer.module.kernel_size)
    axes = layer.module.spatial_dims
    offsets = layer.module.offset_groups * taps * (axes + getattr(layer.module, "modulated", False))
    per_offset = setting.itemsize * prod(layer.output) // layer.output[1]
    sizes = [setting.itemsize * prod(shape) for shape, wants_gradient in layer.inputs[:1] if wants_gradient]
    if hasattr(layer.module, "offset_head") or len(layer.inputs) > 1:
        sizes.append(offsets * per_offset)
    yield of(setting, "all-reduce", len(sizes), sum(sizes))


def _tensor_rules() -> dict[type[nn.Module], Callable[[Setting, Layer], Iterator[Collective]]]:
    from ..nn import DCNv3, DCNv4, MSDeformAttn

    return {MSDeformAttn: _of_heads, DCNv3: _of_dcnv3, DCNv4: _of_dcnv4, _DEFORMABLE[0]: _of_convolution}


_TENSOR = _tensor_rules()

STRATEGIES: dict[str, Callable[[Setting], Iterator[Collective]]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "tensor": tensor,
    "spatial": spatial,
}


def fits(setting: Setting, strategy: str) -> bool:
    """Whether a strategy divides the model among so many ranks.

    Tensor parallelism needs heads or channels that the ranks divide; spatial parallelism divides networks of
    convolutions, and needs a row of every input for each rank.
    """
    if strategy == "tensor" and setting.gpus > 1:
        return any(True for _ in tensor(setting))
    if strategy != "spatial":
        return True
    ours = {name.removesuffix("_backward") for name in setting.step.operators if "." not in name}
    convolved = [layer for layer in setting.step.layers if isinstance(layer.module, _CONVOLUTIONS)]
    rows = min((layer.inputs[0][0][2] for layer in convolved), default=0)
    return ours <= {"deform_conv"} and rows >= setting.gpus


def planned(setting: Setting, strategy: str) -> Plan:
    """The plan of one strategy.

    Under ``"ddp"`` and ``"fsdp"`` every GPU has samples of its own; ``"tensor"`` and ``"spatial"`` divide the same.
    """
    n, hardware = setting.gpus, setting.hardware
    found = _merged(STRATEGIES[strategy](setting)) if n > 1 else []
    compute = sum(
        _least_seconds(cost, setting) / (n if found and _divides(strategy, name) else 1)
        for name, cost in setting.step.operators.items()
    )
    speed = hardware.link if n <= hardware.together else hardware.network
    communication = sum(collective.sent for collective in found) / speed
    overlaps = strategy in ("ddp", "fsdp")
    seconds = max(compute, communication) if overlaps else compute + communication
    samples = setting.samples * (n if overlaps else 1)
    return Plan(strategy, found, _memory(setting, strategy), compute, communication, seconds, samples)


def _divides(strategy: str, operator: str) -> bool:
    """Whether the ranks share an operator; of tensor parallelism those of this package, which have no namespace."""
    return strategy == "spatial" or (strategy == "tensor" and "." not in operator)


def _least_seconds(cost: Cost, setting: Setting) -> float:
    hardware = setting.hardware
    matrix = hardware.matrix["bfloat16" if setting.is_half else "float32"]
    moved = cost.bytes * setting.itemsize / setting.step.itemsize
    return max(cost.matrix / matrix + cost.vector / hardware.vector, moved / hardware.bandwidth)


def _memory(setting: Setting, strategy: str) -> dict[str, float]:
    n = setting.gpus
    size = float(setting.weights())
    shares = 1.0
    if strategy == "fsdp":
        shares = n
    elif strategy == "tensor":
        divided = sum(p.nbytes for p in _divided_parameters(setting))
        shares = size / (size - divided + divided / n) if size else 1.0
    activations = setting.step.activations * setting.itemsize / setting.step.itemsize
    memory = {
        "parameters": size / shares,
        "gradients": size / shares,
        "optimizer": 2 * size / shares,
        "activations": activations / (n if strategy == "spatial" else 1),
    }
    if strategy == "ddp" and n > 1:
        memory["buckets"] = size
    if strategy == "fsdp" and n > 1:
        units = [sum(p.nbytes for p in unit.parameters()) for unit in fsdp_units(setting.model)]
        root = setting.weights() - sum(units)
        # The next unit is gathered while one computes, and its gradient waits to be scattered.
        memory["gathered"] = root + 3 * max(units, default=0)
    return memory


def _divided_parameters(setting: Setting) -> Iterator[nn.Parameter]:
    from ..distributed._tensor_parallel import DIVIDED

    for module in setting.model.modules():
        parts = next((parts for kind, parts in DIVIDED.items() if isinstance(module, kind)), {})
        for name, axes in parts.items():
            part = module.get_submodule(name)
            yield from (getattr(part, key) for key in axes if getattr(part, key) is not None)


def _merged(collectives: Iterator[Collective]) -> list[Collective]:
    kinds: dict[str, Collective] = {}
    for one in collectives:
        before = kinds.get(one.kind, Collective(one.kind, 0, 0, 0))
        kinds[one.kind] = Collective(
            one.kind, before.calls + one.calls, before.bytes + one.bytes, before.sent + one.sent
        )
    return [one for one in kinds.values() if one.calls]
