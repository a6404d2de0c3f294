"""Comparison of two modules or functions: outputs, every gradient, and which differences are expected."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from ._testing import LEAST, half_of_digits
from .ops._operator import NAMESPACE
from .ops.deform_aggregate import reference as deform_aggregate
from .ops.sample.reference import tap_grid

_HALF = (torch.float16, torch.bfloat16)

# The number of roundings in which a caller may compute a coordinate.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Quantity:
    """One output, or one gradient, of both sides."""

    name: str
    dtype: torch.dtype
    absolute: float
    """The largest difference of an element; infinite if only one side is finite there, or if the shapes differ."""
    relative: float
    """``absolute`` divided by the largest value of side a."""
    index: tuple[int, ...]
    """The position of the largest difference."""
    errors: tuple[float, float] | None
    """The largest errors of a and of b against side a in float64; None without that run."""
    allowed: float
    """The largest error of b (without a float64 run, the largest difference) that rounding explains."""

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return (self.absolute if self.errors is None else self.errors[1]) <= self.allowed


@dataclass(frozen=True)
class Report:
    """The result of :func:`verify`; print it."""

    quantities: tuple[Quantity, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether rounding explains every difference."""
        return all(quantity.ok for quantity in self.quantities)

    def check(self) -> None:
        """Raise an AssertionError with the report unless :attr:`ok`."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        head = ["quantity", "dtype", "difference", "relative", "at", "a's error", "b's error", "allowed", ""]
        rows = [head, *(_row(quantity) for quantity in self.quantities)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        wrong = sum(not quantity.ok for quantity in self.quantities)
        verdict = f"{wrong} of {len(self.quantities)} differ by more than rounding" if wrong else "equal up to rounding"
        return "\n".join([*lines, "", verdict, *(f"- {note}" for note in self.notes)])


def verify(
    a: Callable[..., Any], b: Callable[..., Any], inputs: Any, *, gradients: bool = True, strict: bool = False
) -> Report:
    """Compare the outputs and all gradients of two modules or functions on the same inputs.

    ``difference = max |b(inputs) - a(inputs)|``, for each output, and for the gradient of
    ``sum(cotangent * output)``, with a fixed random cotangent, by each floating input and each parameter.

    ``a`` is also run in float64. ``b`` passes if its error relative to that run is at most twice the error of ``a``,
    plus a few roundings. If the float64 run fails or computes something else (because of a dtype written into the code,
    or dropout), ``b`` passes if half of the digits agree.

    Nothing is changed: neither parameters, buffers, ``.grad`` and the training mode of the modules nor the state of
    torch's random number generators, from which both sides start alike.

    Args:
        a: the module or function to trust.
        b: the one to compare; parameters are matched by their names.
        inputs: the arguments of both: a tensor, a sequence of positional or a mapping of keyword arguments.
        gradients: whether to compare gradients too, by all floating tensors, even if they do not require one.
        strict: whether to raise an error if a difference is larger than rounding explains.

    Returns:
        A report: print it, or read its ``ok``, ``quantities`` and ``notes``. The notes explain which differences are
        expected.

    Raises:
        TypeError: ``a`` or ``b`` cannot be called.
        ValueError: the two sides have no output tensor in common.
        AssertionError: ``strict``, and a difference is larger than rounding explains.

    Example:
        >>> import torch
        >>> from deformkit.nn import DeformConv2d
        >>> layer, inputs = DeformConv2d(4, 8, 3), (torch.randn(1, 4, 9, 9), torch.zeros(1, 18, 7, 7))
        >>> def plain(input, offset):
        ...     return torch.nn.functional.conv2d(input, layer.weight, layer.bias)
        >>> verify(plain, layer, inputs, gradients=False).ok
        True
    """
    for name, side in (("a", a), ("b", b)):
        if not callable(side):
            raise TypeError(f"{name} is a {type(side).__name__}; it must be a module or a function")
    call = _Call(inputs)
    found_a, found_b = call.evaluate(a, gradients), call.evaluate(b, gradients)
    names = [name for name in found_a if name in found_b]
    if not any(name.startswith("output") for name in names):
        raise ValueError(f"a gives {_listed(found_a)} and b gives {_listed(found_b)}; they have no output in common")
    truth, reason = call.truth(a, gradients, found_a)
    largest = {_kind(name): 0.0 for name in names}
    for name in names:
        largest[_kind(name)] = max(largest[_kind(name)], _largest(found_a[name]))
    quantities = tuple(
        _compare(name, found_a[name], found_b[name], truth.get(name) if truth else None, LEAST * largest[_kind(name)])
        for name in names
    )
    notes = [*([reason] if reason else []), *_unmatched(found_a, found_b), *_expected(quantities, call, b)]
    report = Report(quantities, tuple(notes))
    if strict:
        report.check()
    return report


class _Call:
    """The inputs, at copies of which each side is evaluated."""

    def __init__(self, inputs: Any) -> None:
        if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence | Mapping):
            inputs = (inputs,)
        named, self.spec = tree_flatten_with_path(inputs)
        self.leaves = [value for _, value in named]
        self.names = [f"inputs{keystr(path)}" for path, _ in named]
        self.dtypes = {leaf.dtype for leaf in self.leaves if isinstance(leaf, Tensor)}

    def evaluate(
        self, side: Callable[..., Any], gradients: bool, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Outputs and gradients by inputs and parameters, by name; in ``dtype`` instead of the dtypes of the side."""
        copies = [_copied(leaf, dtype, gradients) for leaf in self.leaves]
        leaves = {
            f"gradient of {name}": copy
            for name, copy in zip(self.names, copies, strict=True)
            if isinstance(copy, Tensor) and copy.requires_grad
        }
        run, state = side, {}
        if isinstance(side, nn.Module):
            state = {name: _copied(value, dtype, gradients) for name, value in side.named_parameters()}
            leaves |= {f"gradient of {name}": copy for name, copy in state.items() if copy.requires_grad}
            state |= {name: _copied(value, dtype, False) for name, value in side.named_buffers()}
            module = side

            def run(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(module, state, args, kwargs)

        # A layer may change its input in place; a leaf of the graph may not be changed.
        arguments = [copy.clone() if isinstance(copy, Tensor) else copy for copy in copies]
        with _seeded([*copies, *state.values()]), torch.enable_grad() if gradients else torch.no_grad():
            # Regions get no gradient from any implementation, and all floating inputs require one here.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "rois requires a gradient")
                result = self._called(run, arguments)
            outputs = {name: value for name, value in _tensors(result, "output")}
            found = {name: value.detach() for name, value in outputs.items()}
            ends = {name: value for name, value in outputs.items() if value.requires_grad}
            if ends and leaves:
                cotangents = [_cotangent(value) for value in ends.values()]
                grads = torch.autograd.grad(list(ends.values()), list(leaves.values()), cotangents, allow_unused=True)
                found |= {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        return found

    def truth(
        self, side: Callable[..., Any], gradients: bool, found: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor] | None, str | None]:
        """The result of ``side`` in float64; or None, and why it says nothing about rounding."""
        try:
            truth = self.evaluate(side, gradients, torch.float64)
        except Exception as failure:  # code that was not written for float64 may raise anything
            return None, f"No float64 run to compare with: {type(failure).__name__}: {str(failure).splitlines()[0]}"
        for name, value in found.items():
            if name.startswith("output") and value.is_floating_point():
                true = truth.get(name)
                if true is None or _difference(value, true)[0] > half_of_digits(value.dtype) * _largest(true):
                    return None, f"No float64 run to compare with: {name} of a differs there by more than rounding"
        return truth, None

    def points(self, side: Callable[..., Any]) -> "_Points":
        """The number of points that our operators sample in a run of ``side``."""
        with _Points() as points:
            self.evaluate(side, False)
        return points

    def _called(self, run: Callable[..., Any], leaves: list[Any]) -> Any:
        inputs = tree_unflatten(leaves, self.spec)
        return run(**inputs) if isinstance(inputs, Mapping) else run(*inputs)


class _Points(TorchDispatchMode):
    """Counts the points of every call of our operators, those exactly at -1, and those on or close to a grid line."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.on_edge = self.on_line = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE and func._opname in _PLACES:
            for points in _PLACES[func._opname](*args):
                self.all += points[..., 0].numel()
                self.on_edge += int((points == -1).any(-1).sum())
                near = (points - points.round()).abs() <= _ROUNDINGS * _eps(points.dtype) * (points.abs() + 1)
                self.on_line += int(near.any(-1).sum())
        return func(*args, **(kwargs or {}))


def _conv_places(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Iterator[Tensor]:
    kernel_size, size = weight.shape[2:], offset.shape[2:]
    base = tap_grid(kernel_size, size, stride, padding, dilation, offset.device)
    yield base + offset.unflatten(1, (-1, kernel_size.numel(), len(size))).movedim(3, -1)


def _transpose_places(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    extra: Any,
    groups: int,
    dilation: Any,
    *_: Any,
) -> Iterator[Tensor]:
    yield from _conv_places(input, offset, weight, None, stride, padding, dilation)


def _aggregate_places(value: Tensor, offset: Tensor, weight: Tensor, *window: Any) -> Iterator[Tensor]:
    base, shift = deform_aggregate.points(offset, *window[:-1])
    yield base + shift


def _attention_places(
    value: Tensor,
    spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Any,
    mode: int,
) -> Iterator[Tensor]:
    axes = sampling_locations.shape[-1]
    for level, locations in enumerate(sampling_locations.split(list(num_points), 3)):
        size = torch.tensor(spatial_shapes[level * axes : (level + 1) * axes], device=locations.device)
        yield locations * size.flip(0) - 0.5


def _correlation_places(query: Tensor, *args: Any) -> Iterator[Tensor]:
    key, spatial_shapes, sampling_locations, *rest = args
    yield from _attention_places(key, spatial_shapes, sampling_locations, query, *rest)


_PLACES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "deform_conv": _conv_places,
    "deform_conv_transpose": _transpose_places,
    "deform_correlate": _correlation_places,
    "deform_aggregate": _aggregate_places,
    "ms_deform_attn": _attention_places,
}


def _expected(quantities: Sequence[Quantity], call: _Call, side: Callable[..., Any]) -> Iterator[str]:
    """The differences that are expected, in words."""
    if any(quantity.absolute > 0 for quantity in quantities):
        yield "Sums are added in another order: the last digits differ, and a few more after many layers."
    halves = sorted({str(q.dtype).removeprefix("torch.") for q in quantities if q.dtype in _HALF})
    if halves:
        yield (
            f"In {' and '.join(halves)} deformkit accumulates in float32 and rounds once; an implementation that "
            "accumulates in half precision has a larger error."
        )
        yield (
            "deformkit computes coordinates in float32. Coordinates that the caller has rounded to half precision are "
            "off by up to a pixel on large maps, on both sides."
        )
    points = call.points(side)
    if points.on_line:
        yield (
            f"{points.on_line} of {points.all} points lie on a grid line, up to rounding: the gradient by such a point "
            "differs on the two sides of the line, and the rounding of each implementation decides between them."
        )
    if points.on_edge:
        yield (
            f"{points.on_edge} of {points.all} points lie exactly at -1 on an axis: deformkit, torchvision and "
            "grid_sample return the right-hand derivative by such a point; the CUDA kernels of mmcv, Deformable DETR, "
            "DCNv3 and DCNv4 return 0."
        )


def _unmatched(found_a: Mapping[str, Tensor], found_b: Mapping[str, Tensor]) -> Iterator[str]:
    for side, here, there in (("a", found_a, found_b), ("b", found_b, found_a)):
        alone = [name for name in here if name not in there]
        if alone:
            yield f"Only {side} has {_listed(alone)}; nothing is compared there."


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "no tensor"


def _compare(name: str, a: Tensor, b: Tensor, truth: Tensor | None, least: float) -> Quantity:
    largest = _largest(a)
    dtype = max((a.dtype, b.dtype), key=_eps)
    absolute, index = _difference(b, a)
    errors = None if truth is None else (_difference(a, truth)[0], _difference(b, truth)[0])
    if errors and isfinite(errors[0]):
        floor = _eps(dtype) * (2 if dtype in _HALF else 32) * max(largest, least)
        allowed = 2 * errors[0] + floor
    else:
        errors, allowed = None, half_of_digits(dtype) * max(largest, least)
    relative = absolute / largest if largest else (inf if absolute else 0.0)
    return Quantity(name, dtype, absolute, relative, index, errors, allowed)


def _difference(actual: Tensor, expected: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest difference and its position; infinite if only one side is finite there, or if the shapes differ."""
    if actual.shape != expected.shape:
        return inf, ()
    if not actual.numel():
        return 0.0, ()
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (actual - expected).abs()).nan_to_num(nan=inf, posinf=inf)
    position = gap.argmax()
    return gap.flatten()[position].item(), tuple(int(i) for i in torch.unravel_index(position, gap.shape))


def _largest(value: Tensor) -> float:
    finite = value.detach().double()
    finite = finite[finite.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _kind(name: str) -> str:
    return name.split(" ")[0].split("[")[0].split(".")[0]


def _copied(value: Any, dtype: torch.dtype | None, differentiate: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    if not copy.is_floating_point():
        return copy
    return copy.to(dtype or copy.dtype).requires_grad_(differentiate)


def _cotangent(output: Tensor) -> Tensor:
    # Rounded to bfloat16, so that it is the same in every dtype.
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return values.to(output)


@contextmanager
def _seeded(values: Sequence[Any]) -> Iterator[None]:
    """Start from the same random numbers, and restore the state of the generators afterwards."""
    devices = {value.device.index for value in values if isinstance(value, Tensor) and value.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        torch.manual_seed(0)
        yield


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the result of a call, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(_tensors(part, f"{name}.{key}") for key, part in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from chain.from_iterable(_tensors(part, f"{name}[{i}]") for i, part in enumerate(value))
    elif is_dataclass(value):
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
        yield from chain.from_iterable(_tensors(part, f"{name}.{key}") for key, part in parts)


def _row(quantity: Quantity) -> list[str]:
    errors = quantity.errors or (nan, nan)
    return [
        quantity.name,
        str(quantity.dtype).removeprefix("torch."),
        f"{quantity.absolute:.1e}",
        f"{quantity.relative:.1e}",
        str(list(quantity.index)),
        *(f"{error:.1e}" for error in errors),
        f"{quantity.allowed:.1e}",
        "" if quantity.ok else "OFF",
    ]
