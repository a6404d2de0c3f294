"""Collecting what the deformable layers of a model sample, from the calls of the operators."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._patching import patch, unpatch
from ..nn.deform_conv import _DeformConv
from ..ops._shape import compute_dtype, name_of
from ..ops.deform_aggregate.reference import points as aggregate_points
from ..ops.deform_roi_pool.reference import sampling_points as roi_points
from ..ops.sample.reference import tap_grid

Kind = Literal["deform_conv", "deform_aggregate", "ms_deform_attn", "deform_roi_pool"]


@dataclass(frozen=True)
class Layer:
    """What one call of a deformable operator sampled.

    B is the batch size (for RoI pooling, the number of RoIs), ``*out`` the output positions (for attention, the
    queries), G the number of offset groups, heads or, for RoI pooling, 1, P the number of samples of an output position
    in one group, and N the number of spatial axes. All tensors are detached, on the CPU, in float32 or float64.
    """

    name: str
    """The name of the module that called the operator, as in ``model.named_modules()``; "" is the model itself."""
    kind: Kind
    """The operator: ``"deform_conv"``, ``"deform_aggregate"``, ``"ms_deform_attn"`` or ``"deform_roi_pool"``."""
    sizes: tuple[tuple[int, ...], ...]
    """The spatial size of each level of the input, in tensor-axis order; only attention has more than one level."""
    positions: Tensor = field(repr=False)
    """``[B, *out, G, P, N]``: absolute positions in pixels of the level that is sampled, in tensor-axis order.

    0 is the centre of the first pixel. Positions precede the boundary rule, so that they may lie outside the input.
    RoIs with fewer samples than others are filled up with NaN, of weight 0.
    """
    weights: Tensor = field(repr=False)
    """``[B, *out, G, P]``: the mask of a convolution (1 without a mask), the weights of aggregation or attention, and
    one over the number of samples of a bin in RoI pooling."""
    levels: Tensor = field(repr=False)
    """``[P]``: the level that each sample reads."""
    anchors: Tensor = field(repr=False)
    """``[B, *out, N]``: the place that each output position stands for, in pixels of the first level.

    For convolution and aggregation this is the middle of the undeformed window; for RoI pooling, the mean of samples.
    A query of self-attention stands for its own pixel. Any other query stands for the weighted mean of its samples.
    """
    images: Tensor = field(repr=False)
    """``[B]``: the image of the batch that each row reads."""
    boundary: str
    """The boundary rule of the call; ``"pool"`` for the rule of RoI pooling."""
    mode: str
    """``"linear"`` or ``"nearest"``."""

    @property
    def axes(self) -> int:
        """N, the number of spatial axes."""
        return len(self.sizes[0])

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the output positions."""
        return tuple(self.positions.shape[1:-3])

    def on(self, size: Sequence[int]) -> Tensor:
        """The positions ``[B, *out, G, P, N]``, in pixels of an image of ``size`` that covers the same extent.

        A point at p of a level of size s lies at ``(p + 1/2) * size / s - 1/2``.
        """
        return rescale(self.positions, torch.tensor(self.sizes)[self.levels], size)

    def anchors_on(self, size: Sequence[int]) -> Tensor:
        """The anchors ``[B, *out, N]``, in pixels of an image of ``size`` that covers the same extent."""
        return rescale(self.anchors, torch.tensor(self.sizes[0]), size)

    def outside(self) -> Tensor:
        """``[B, *out, G, P]``: whether a sample lies outside its level, beyond the outer edges of the end pixels."""
        last = torch.tensor(self.sizes)[self.levels] - 0.5
        return ((self.positions < -0.5) | (self.positions > last)).any(-1)

    def __str__(self) -> str:
        groups, samples = self.weights.shape[-2:]
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        out = "x".join(map(str, self.out))
        return f"{self.name or '(model)'}: {self.kind}, {out} positions x {groups} x {samples} samples of {sizes}"


def rescale(points: Tensor, size: Tensor, target: Sequence[int]) -> Tensor:
    """``points [..., N]`` of a field of ``size``, in pixels of a field of size ``target`` with the same extent."""
    return (points + 0.5) * (torch.tensor(target) / size) - 0.5


def collect(model: nn.Module, call: Callable[[], Any]) -> list[Layer]:
    """Run ``call`` and return a :class:`Layer` for each call of a deformable operator, in order."""
    # Compiled code calls no hooks and shows no operators.
    eagerly = torch.compiler.set_stance("force_eager")
    with eagerly, _ours(model), _Names(model) as names, _Calls(names) as calls:
        call()
    return calls.layers


@contextmanager
def _ours(model: nn.Module) -> Iterator[None]:
    """With the parts of host libraries replaced by ours, whose calls can be seen; afterwards all is as before."""
    done = patch(model, strict=False)
    try:
        yield
    finally:
        # A model that the user has patched stays patched.
        if done.replaced and not done.already:
            unpatch(done)


class _Names:
    """Which module of a model runs, and what it got as its first tensor."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running: list[tuple[str, nn.Module, Tensor | None]] = []
        self._handles: list[Any] = []

    @property
    def current(self) -> tuple[str, nn.Module, Tensor | None]:
        return self._running[-1] if self._running else ("", self._model, None)

    def __enter__(self) -> "_Names":
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self._running.append((name, module, tensors[0] if tensors else None))

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


class _Calls(TorchDispatchMode):
    """Reads the arguments of our operators, and of torchvision's convolution where it was not replaced."""

    def __init__(self, names: _Names) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = _READERS.get(f"{func.namespace}::{func._opname}")
        if read is not None:
            name, module, given = self._names.current
            self.layers.append(read(name, module, given, *args))
        return output


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", compute_dtype(value.dtype))


def _convolution(
    name: str,
    module: nn.Module,
    given: Tensor | None,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    boundary: int,
) -> Layer:
    kernel = weight.shape[2:]
    axes, taps, size = len(kernel), prod(kernel), tuple(input.shape[2:])
    before = torch.zeros(axes)
    if isinstance(module, _DeformConv) and given is not None:
        # The layer may have padded its input before the operator got it.
        size = tuple(given.shape[-axes:])
        if module.padding_mode != "zeros":
            before = torch.tensor(module._padding_before, dtype=torch.float32)
    shift = _kept(offset).unflatten(1, (-1, taps, axes)).movedim((1, 2, 3), (-3, -2, -1))
    grid = tap_grid(kernel, offset.shape[2:], stride, padding, dilation, torch.device("cpu"))
    base = grid.movedim(0, -2).unsqueeze(-3) - before
    weights = torch.ones(shift.shape[:-1]) if mask is None else _kept(mask)
    if mask is not None:
        weights = weights.unflatten(1, (-1, taps)).movedim((1, 2), (-2, -1))
    middle = base.mean((-3, -2)).expand(len(shift), *base.shape[:-3], axes)
    return _layer(name, "deform_conv", (size,), base + shift, weights, middle, name_of("boundary", boundary))


def _torchvision(name: str, module: nn.Module, given: Tensor | None, *args: Any) -> Layer:
    input, weight, offset, mask, bias, *steps, _, _, use_mask = args
    window = (steps[0:2], steps[2:4], steps[4:6])
    return _convolution(name, module, given, input, offset, weight, bias, *window, mask if use_mask else None, 0)


def _aggregation(
    name: str,
    module: nn.Module,
    given: Tensor | None,
    value: Tensor,
    offset: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
    boundary: int,
) -> Layer:
    window = (kernel_size, stride, padding, dilation)
    base, shift = aggregate_points(_kept(offset), *window, offset_scale, remove_center)
    middle = base.squeeze((-3, -2)).float().expand(len(shift), *shift.shape[1:-3], len(kernel_size))
    size = tuple(value.shape[1:-2])
    rule = name_of("boundary", boundary)
    return _layer(name, "deform_aggregate", (size,), base + shift, _kept(weight), middle, rule)


def _attention(
    name: str,
    module: nn.Module,
    given: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    mode: int,
) -> Layer:
    axes, chosen = sampling_locations.shape[-1], name_of("mode", mode)
    sizes = tuple(tuple(map(int, spatial_shapes[i : i + axes])) for i in range(0, len(spatial_shapes), axes))
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(num_points)))
    locations, weights = _kept(sampling_locations).flip(-1), _kept(attention_weights)
    positions = locations * torch.tensor(sizes)[levels] - 0.5
    if locations.shape[1] == value.shape[1] == sum(map(prod, sizes)):
        # Self-attention: a query for each pixel of each level.
        centres = torch.cat([_centres(size) for size in sizes]).to(locations.dtype)
        centres = centres.expand(len(locations), *centres.shape)
    else:
        share = weights.unsqueeze(-1)
        centres = (locations * share).sum((-3, -2)) / share.sum((-3, -2))
    anchors = centres * torch.tensor(sizes[0]) - 0.5
    boundary = "border" if chosen == "nearest" else "zeros"
    return _layer(name, "ms_deform_attn", sizes, positions, weights, anchors, boundary, levels, mode=chosen)


def _centres(size: Sequence[int]) -> Tensor:
    """The centres of the pixels of a level, ``[pixels, N]``, as shares of its extent."""
    along = [(torch.arange(n) + 0.5) / n for n in size]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), -1).flatten(0, -2)


def _pooling(
    name: str,
    module: nn.Module,
    given: Tensor | None,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    group_size: Sequence[int],
) -> Layer:
    moved = None if offset is None else _kept(offset)
    points = roi_points(_kept(rois), moved, output_size, spatial_scale, sampling_ratio, gamma)
    most = max((p.shape[-2] for p in points), default=1)
    shape = (len(points), *output_size, 1, most)
    positions = torch.full((*shape, input.dim() - 2), torch.nan, dtype=compute_dtype(input.dtype))
    weights = torch.zeros(shape, dtype=positions.dtype)
    for row, found in enumerate(points):
        count = found.shape[-2]
        positions[row, ..., 0, :count, :] = found
        weights[row, ..., 0, :count] = 1 / max(count, 1)
    anchors = positions.nanmean((-3, -2))
    images = rois[:, 0].detach().cpu().to(torch.int64)
    size = tuple(input.shape[2:])
    return _layer(name, "deform_roi_pool", (size,), positions, weights, anchors, "pool", images=images)


def _layer(
    name: str,
    kind: Kind,
    sizes: tuple[tuple[int, ...], ...],
    positions: Tensor,
    weights: Tensor,
    anchors: Tensor,
    boundary: str,
    levels: Tensor | None = None,
    images: Tensor | None = None,
    mode: str = "linear",
) -> Layer:
    levels = torch.zeros(positions.shape[-2], dtype=torch.int64) if levels is None else levels
    images = torch.arange(len(positions)) if images is None else images
    return Layer(name, kind, sizes, positions, weights, levels, anchors, images, boundary, mode)


_READERS: dict[str, Callable[..., Layer]] = {
    "deformkit::deform_conv": _convolution,
    "deformkit::deform_aggregate": _aggregation,
    "deformkit::ms_deform_attn": _attention,
    "deformkit::deform_roi_pool": _pooling,
    "torchvision::deform_conv2d": _torchvision,
}
