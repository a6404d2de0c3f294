"""The public function ``monitor`` and what it returns."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .nn import DCNv3, DCNv4
from .nn.deform_conv import _PackedDeformConv
from .ops import _suspect
from .ops._shape import check_count

if TYPE_CHECKING:
    from .viz._collect import Layer

# A sample whose weight is smaller than this does not count as read.
_NO_WEIGHT = 1e-3
# Warnings are given if the share of samples outside, beyond that of an undeformed layer, exceeds these.
_SWAPPED_OUTSIDE = 0.1
_EXPLODED_OUTSIDE = 0.3
# Attention spreads its points over levels of a few pixels.
_EXPLODED_OUTSIDE_ATTENTION = 0.5
# The distance of a query's samples from its own pixel, as a share of the image, that may show swapped axes.
_SWAPPED_DISTANCE = 0.1

# Layers that predict their offsets themselves cannot have their axes swapped.
_PREDICTING = (_PackedDeformConv, DCNv3, DCNv4)

# Which positional arguments of an operator to look for NaN in, and to measure.
_ARGUMENTS: dict[str, dict[str, int]] = {
    "deformkit::deform_conv": {"input": 0, "offset": 1, "mask": 7},
    "torchvision::deform_conv2d": {"input": 0, "offset": 2, "mask": 3},
    "deformkit::deform_aggregate": {"value": 0, "offset": 1, "weight": 2},
    "deformkit::ms_deform_attn": {"value": 0, "sampling_locations": 2, "attention_weights": 3},
    "deformkit::deform_roi_pool": {"input": 0, "rois": 1, "offset": 2},
}


class Writer(Protocol):
    """What a monitor writes to, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number of one step."""


@dataclass(frozen=True)
class FirstNaN:
    """Where a NaN was seen first."""

    step: int
    """The number of the step, from 0."""
    layer: str
    """The name of the layer, as in ``model.named_modules()``."""
    tensor: str
    """The argument of the operator that contained the NaN, or ``"output"``."""


class Monitor:
    """Measures the deformable layers of a model while it runs; made by :func:`monitor`.

    It is a context manager; leaving the context calls :meth:`remove`. ``print`` shows :attr:`latest` as a table.
    """

    latest: dict[str, dict[str, float]]
    """The measurements of the last measured step, by the name of the layer, in the order of the calls."""
    step: int
    """The number of steps so far."""
    first_nan: FirstNaN | None
    """Where a NaN was seen first, or None."""

    def __init__(self, model: nn.Module, writer: Writer | None, every: int) -> None:
        # Imported here because viz is imported when it is first used.
        from .viz._collect import _ours

        self.latest, self.step, self.first_nan = {}, 0, None
        self._model, self._writer, self._every = model, writer, every
        self._warned: set[str] = set()
        self._measuring: ExitStack | None = None
        self._installed = ExitStack()
        self._installed.enter_context(_ours(model))
        for handle in (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ):
            self._installed.callback(handle.remove)

    def remove(self) -> None:
        """Stop measuring and leave the model as it was before. Calling it again does nothing."""
        self._stop()
        self._installed.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __str__(self) -> str:
        names = ["layer", *dict.fromkeys(key for found in self.latest.values() for key in found)]
        rows = [names]
        for layer, found in self.latest.items():
            rows.append([layer or "(model)", *(f"{found[key]:.3f}" if key in found else "" for key in names[1:])])
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(lines)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.step % self._every:
            return
        self._stop()
        self.latest = {}
        self._measuring = ExitStack()
        # Compiled code calls no hooks and shows no operators.
        self._measuring.enter_context(torch.compiler.set_stance("force_eager"))
        self._measuring.enter_context(_calls(self._model, args, kwargs, self._measured))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._measuring is not None:
            self._stop()
            self._write()
        self.step += 1

    def _stop(self) -> None:
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def _write(self) -> None:
        if self._writer is None:
            return
        for layer, found in self.latest.items():
            for key, value in found.items():
                self._writer.add_scalar(f"deformkit/{layer or 'model'}/{key}", value, self.step)

    def _measured(self, call: "_Call") -> None:
        # torch.compile wraps the model.
        base = call.layer.name.removeprefix("_orig_mod").removeprefix(".")
        name, count = base, 1
        while name in self.latest:
            count += 1
            name = f"{base}#{count}"
        self.latest[name] = call.statistics()
        if self.first_nan is None and (tensor := call.with_nan()) is not None:
            self.first_nan = FirstNaN(self.step, name, tensor)
            self._warn(
                "NaN",
                f"{_named(name)} has NaN in its {tensor} in step {self.step}, and no deformable layer before it does. "
                "Use a smaller learning rate or clip gradients; torch.autograd.set_detect_anomaly(True) shows "
                "whether a gradient was NaN first",
            )
        found = call.mistake()
        if found is not None:
            self._warn(found[0], f"{_named(name)}: {found[1]}")

    def _warn(self, kind: str, message: str) -> None:
        # The operators themselves warn of wrong units, too.
        if kind not in self._warned | _suspect.given:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=2)


def _named(layer: str) -> str:
    return f"layer {layer!r}" if layer else "the model"


def monitor(model: nn.Module, writer: Writer | None = None, every: int = 1) -> Monitor:
    """Measure the offsets, samples and masks of every deformable layer of a model while it trains.

    A step is one call of the model. After each measured step, :attr:`Monitor.latest` is a dict with one entry per
    deformable layer, by the name of the layer (a second call of it in the same step is ``name#2``):

    * ``offset_mean``, ``offset_std``, ``offset_max``: mean, standard deviation and maximum of the length of the
      offsets, in pixels: ``length = |position - undeformed position|``. Attention has no undeformed positions; there,
      the length is the distance from the query's own pixel (self-attention) or from the weighted mean of its samples.
    * ``outside``: the share of samples that lie outside the input, 0 to 1. In a padded layer it is not 0 even without
      offsets.
    * ``dead_taps``: the share of taps (of attention: points) that no output position reads, 0 to 1. A position does not
      read a tap if its sample lies outside and the boundary rule is not ``"border"``, or if its weight is below 0.001.
    * ``mask_entropy``: ``-sum over p of w[p] * log(w[p]) / log(P)`` with the P weights w of a position in one group
      normalised to a sum of 1, as a mean: 1 if all weights are equal, 0 if one sample has all the weight. Only layers
      with a mask or with attention weights have it.

    Measuring covers the layers and functions of deformkit and everything that :func:`deformkit.patch` handles; a model
    that is not patched is patched until the monitor is removed. Measured steps run eagerly, also in a compiled model,
    and copy offsets and masks to the CPU. ``every`` makes them rare.

    One warning of each kind, with a cure, is given if

    * a layer has NaN in an argument or in its output (:attr:`Monitor.first_nan` keeps where),
    * many more samples than without offsets lie outside, or offsets are as long as half of the input,
    * offsets or locations look as if h and w were swapped,
    * attention locations look like pixels, or like -1 to 1, instead of 0 to 1.

    Args:
        model: the module whose calls are measured; of a compiled model, what ``torch.compile`` returned.
        writer: has a method ``add_scalar(tag, scalar_value, global_step)``, as
            ``torch.utils.tensorboard.SummaryWriter`` has; gets ``deformkit/<layer>/<measurement>``.
        every: measure one step of this many.

    Returns:
        A :class:`Monitor`, which is also a context manager; :meth:`Monitor.remove` ends it.

    Raises:
        TypeError: ``model`` is not a module, or ``writer`` has no method ``add_scalar``.
        ValueError: ``every`` is less than 1.

    Example:
        >>> import torch
        >>> from deformkit.nn import PackedDeformConv2d
        >>> model = torch.nn.Sequential(PackedDeformConv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> with monitor(model) as found:
        ...     output = model(torch.randn(2, 3, 20, 30))
        >>> found.latest
        {'0': {'offset_mean': 0.0, 'offset_std': 0.0, 'offset_max': 0.0, 'outside': 0.0, 'dead_taps': 0.0}}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"writer is a {type(writer).__name__}; it must have a method add_scalar")
    check_count("every", every)
    return Monitor(model, writer, every)


def _calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], measured: Callable[["_Call"], None]
) -> ExitStack:
    """A context in which ``measured`` gets each call of a deformable operator inside the running ``model``."""
    from .viz import _collect

    class Names(_collect._Names):
        """The modules inside ``model``, whose own call has begun already."""

        def __enter__(self) -> "Names":
            for name, module in self._model.named_modules():
                if module is not self._model:
                    self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
                    self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
            self._entering("")(self._model, args, kwargs)
            return self

    class Calls(_collect._Calls):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = super().__torch_dispatch__(func, types, args, kwargs)
            if self.layers:
                operator = f"{func.namespace}::{func._opname}"
                measured(_Call(self.layers.pop(), operator, args, output, *self._names.current))
            return output

    stack = ExitStack()
    stack.enter_context(Calls(stack.enter_context(Names(model))))
    return stack


class _Call:
    """One call of a deformable operator."""

    def __init__(
        self,
        layer: "Layer",
        operator: str,
        args: tuple[Any, ...],
        output: Any,
        name: str,
        module: nn.Module,
        given: Tensor | None,
    ) -> None:
        self.layer, self._operator, self._args, self._output = layer, operator, args, output
        self._module = module
        self._offset = layer.positions - (undeformed := self._undeformed(name, given))
        self._outside = float(layer.outside().double().mean())
        self._swapped_outside = self._share_outside(undeformed + self._offset.flip(-1))
        self._outside_undeformed = 0.0 if layer.kind == "ms_deform_attn" else self._share_outside(undeformed)

    def statistics(self) -> dict[str, float]:
        """What :func:`monitor` measures, by name."""
        # RoIs with fewer samples than others are filled up with NaN of weight 0.
        filled = (self.layer.weights == 0) & (self.layer.kind == "deform_roi_pool")
        length = self._offset.norm(dim=-1)[~filled]
        if not length.numel():
            return {}
        found = {
            "offset_mean": float(length.mean()),
            "offset_std": float(length.std(correction=0)),
            "offset_max": float(length.max()),
            "outside": self._outside,
            "dead_taps": self._dead_taps(),
        }
        if self._weighted() and self.layer.weights.shape[-1] > 1:
            found["mask_entropy"] = self._mask_entropy()
        return found

    def with_nan(self) -> str | None:
        """The first argument that contains NaN, or ``"output"``."""
        for name, index in _ARGUMENTS[self._operator].items():
            value = self._args[index]
            if isinstance(value, Tensor) and value.isnan().any():
                return name
        outputs = self._output if isinstance(self._output, (tuple, list)) else [self._output]
        return "output" if outputs[0].isnan().any() else None

    def mistake(self) -> tuple[str, str] | None:
        """A frequent mistake that the values reveal: its kind, and a message with the cure."""
        if not self._offset.numel() or not self.layer.positions.isfinite().all():
            return None
        if self.layer.kind == "ms_deform_attn":
            locations = self._argument("sampling_locations").detach()
            # The points of a query spread around its reference point, whose units show more clearly.
            means = locations.mean((-3, -2), keepdim=True)
            units = _suspect.location_units(locations) or _suspect.location_units(means)
            if units is not None:
                return units
        return self._swapped() or self._exploded()

    def _swapped(self) -> tuple[str, str] | None:
        if self.layer.axes < 2 or isinstance(self._module, _PREDICTING) or self.layer.kind == "deform_roi_pool":
            return None
        if self.layer.kind == "ms_deform_attn":
            return self._swapped_locations()
        excess, otherwise = (x - self._outside_undeformed for x in (self._outside, self._swapped_outside))
        if excess < _SWAPPED_OUTSIDE or otherwise > excess / 4:
            return None
        return (
            "swapped",
            f"{self._outside:.0%} of the samples lie outside the input, and {self._swapped_outside:.0%} would if each "
            "tap's offsets were in the reverse order. They must be in tensor-axis order, h before w: are these x "
            "before y? Reverse the coordinates of each tap",
        )

    def _swapped_locations(self) -> tuple[str, str] | None:
        locations = self._argument("sampling_locations")
        if locations.shape[1] != self._argument("value").shape[1]:
            # Only a query of self-attention has a pixel that its locations should be near.
            return None
        size = torch.tensor(self.layer.sizes)[self.layer.levels]
        positions = (self.layer.positions + 0.5) / size
        means = positions.mean((-3, -2))
        own = (self.layer.anchors + 0.5) / torch.tensor(self.layer.sizes[0])
        distance, otherwise = ((p - own).norm(dim=-1).mean() for p in (means, means.flip(-1)))
        if distance < _SWAPPED_DISTANCE or otherwise > distance / 2:
            return None
        return (
            "swapped",
            f"the sampling locations of a query are centred {distance:.2f} from its own pixel on average (the image is "
            f"1 long), and {otherwise:.2f} if their coordinates were in the reverse order. Reference points and "
            "sampling locations must be x first: are these y before x? Reverse their last axis",
        )

    def _exploded(self) -> tuple[str, str] | None:
        length, longest = float(self._offset.norm(dim=-1).nanmean()), max(max(size) for size in self.layer.sizes)
        far = self.layer.kind in ("deform_conv", "deform_aggregate") and length > longest / 2
        most = _EXPLODED_OUTSIDE_ATTENTION if self.layer.kind == "ms_deform_attn" else _EXPLODED_OUTSIDE
        if not far and self._outside - self._outside_undeformed < most:
            return None
        return (
            "exploded",
            f"{self._outside:.0%} of the samples lie outside the input, and offsets are {length:.1f} pixels long on "
            f"average. A sample outside has no gradient with which to return. Use a smaller learning rate for what "
            "predicts the offsets (deformkit.param_groups), clip its gradients, or penalise long offsets",
        )

    def _argument(self, name: str) -> Any:
        return self._args[_ARGUMENTS[self._operator][name]]

    def _weighted(self) -> bool:
        """Whether the samples have weights of their own."""
        if self._operator == "torchvision::deform_conv2d":
            return bool(self._args[-1])
        if self.layer.kind == "deform_conv":
            return self._argument("mask") is not None
        return self.layer.kind != "deform_roi_pool"

    def _undeformed(self, name: str, given: Tensor | None) -> Tensor:
        """The positions without offsets; of attention, the anchors on each level."""
        from .viz._collect import _READERS

        layer = self.layer
        if layer.kind == "ms_deform_attn":
            return torch.stack([layer.anchors_on(layer.sizes[i]) for i in layer.levels.tolist()], -2).unsqueeze(-3)
        args, index = list(self._args), _ARGUMENTS[self._operator]["offset"]
        args[index] = None if args[index] is None else torch.zeros_like(args[index])
        return _READERS[self._operator](name, self._module, given, *args).positions

    def _share_outside(self, positions: Tensor) -> float:
        return float(replace(self.layer, positions=positions).outside().double().mean())

    def _dead_taps(self) -> float:
        read = self.layer.weights.abs() >= _NO_WEIGHT
        if self.layer.boundary != "border":
            read &= ~self.layer.outside()
        # [groups, samples]
        return 1 - float(read.flatten(0, -3).any(0).double().mean())

    def _mask_entropy(self) -> float:
        weights = self.layer.weights.double().abs()
        shares = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return float(torch.special.entr(shares).sum(-1).mean() / log(shares.shape[-1]))
