"""Runs the Triton kernels in place of the C++ ones, so that the tests with CPU tensors test them.

Without a GPU the interpreter of Triton runs them; with one, tensors are copied to it and back.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from deformkit.ops._operator import NAMESPACE, Operator, operators
from deformkit.ops.gpu import has_kernels, launcher

_UNINITIALISED = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
)


def interpreting() -> bool:
    """Whether the kernels of this process run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def instead_of_cpp() -> Iterator[None]:
    """In this context, calls with CPU tensors use the Triton kernels of every operator."""
    answer = _interpreted if interpreting() else _on_cuda
    library = torch.library.Library(NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*overrid", UserWarning)
            for operator in filter(has_kernels, operators.values()):
                library.impl(operator.name, answer(operator), "CPU", allow_override=True)
            for operator in operators.values():
                if operator.partner:
                    library.impl(operator.name, operator.fallback, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def _interpreted(operator: Operator) -> Callable[..., Any]:
    launch = launcher(operator)

    def answer(*args: Any) -> Any:
        # NumPy warns about operations that a GPU permits: infinity times zero, and NaN as an integer in a masked row.
        with numpy.errstate(all="ignore"), _Poisoned(), _patching_once(), _types_once(), integers_that_fit():
            return launch(*args)

    return answer


def _on_cuda(operator: Operator) -> Callable[..., Any]:
    def answer(*args: Any) -> Any:
        with _Poisoned():
            results = operator.overload(*(_moved(v) if isinstance(v, Tensor) else v for v in args))
        return tree_map_only(Tensor, Tensor.cpu, results)

    return answer


def _moved(value: Tensor) -> Tensor:
    """``value`` on the GPU, with the same strides in the same storage."""
    storage = value.detach().untyped_storage().cuda()
    moved = torch.empty(0, dtype=value.dtype, device="cuda")
    return moved.set_(storage, value.storage_offset(), value.shape, value.stride())


class _Poisoned(TorchFunctionMode):
    """Fills the memory of a launcher with NaN, as deterministic algorithms do, to show unwritten elements."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _UNINITIALISED:
            result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).max)
        return result


def last_program_first() -> tuple[Any, str, Any]:
    """The attributes and values that make the interpreter run the programs of a kernel in reverse order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards = builder.set_grid_idx

    def backwards(*place: int) -> None:
        forwards(*(size - 1 - i for i, size in zip(place, builder.grid_dim, strict=True)))

    return builder, "set_grid_idx", backwards


@contextmanager
def _patching_once() -> Iterator[None]:
    """Keep the interpreter from patching the language again in each call, which takes half of its time."""
    from triton.runtime import interpreter

    patch, modules, scopes = interpreter._patch_lang, set(), []

    def once(function: Any) -> Any:
        if id(function.__globals__) not in modules:
            modules.add(id(function.__globals__))
            scopes.append(patch(function))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        for scope in reversed(scopes):
            scope.restore()


_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], Any] = {}
_dtypes: dict[str, Any] = {}


@contextmanager
def _types_once() -> Iterator[None]:
    """Keep the interpreter from making the types of each value again, which takes a third of its time.

    Nor does it unwrap shapes to compare them, which takes a sixth.
    """
    from triton.language import core
    from triton.runtime import interpreter

    make_block, find_dtype, equal = core.block_type.__init__, interpreter._get_np_dtype, core.tuple.__eq__

    # Types of pointers have no hash.
    def block(self: Any, element: Any, shape: Any) -> None:
        kind = element.name, tuple(core._unwrap_shape(shape))
        if kind not in _blocks:
            make_block(self, element, shape)
            _blocks[kind] = vars(self).copy()
        vars(self).update(_blocks[kind])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = type.shape if type.is_block() else ()
        if sizes not in _shapes:
            _shapes[sizes] = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shapes[sizes]

    def dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in _dtypes:
            _dtypes[name] = find_dtype(of)
        return _dtypes[name]

    def same(self: Any, other: Any) -> Any:
        if not isinstance(other, core.tuple | list):
            return equal(self, other)
        return core.constexpr(self.values == (other if isinstance(other, list) else other.values))

    with (
        mock.patch.object(core.block_type, "__init__", block),
        mock.patch.object(core.tensor, "__init__", tensor),
        mock.patch.object(core.tuple, "__eq__", same),
        mock.patch.object(interpreter, "_get_np_dtype", dtype),
    ):
        yield


_EXACT = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}


@contextmanager
def integers_that_fit() -> Iterator[None]:
    """Raise where a sum, a difference or a product of integers exceeds its type: on a GPU it wraps around.

    The interpreter computes as much in a slower way, two fifths of its time, and without ``debug`` does not look at it.
    """
    from triton.language.semantic import TritonSemantic

    def fits(self: Any, one: Any, other: Any, operation: Callable[..., Any]) -> None:
        if one.handle.data.dtype.itemsize == 8 or one.type.scalar.is_bool():
            return
        exact = _EXACT[operation.__name__](one.handle.data.astype(numpy.int64), other.handle.data.astype(numpy.int64))
        if (exact.astype(one.handle.data.dtype) != exact).any():
            raise OverflowError(f"{operation.__name__} exceeds {one.type.scalar}: {exact.min()} to {exact.max()}")

    with mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", fits):
        yield
