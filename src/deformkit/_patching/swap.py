"""Swapping a host library's deformable parts for ours, and back."""

import dis
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import RLock
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast
from weakref import ref

import torch
from torch import nn
from torch.fx import GraphModule

from .hosts import FUNCTIONS, HOSTS, LAYERS, PACKAGES, Part, find

# The attributes that a module had before, by name. Copies and pickles keep them, so that these can be restored too.
_BEFORE = "_deformkit_before"

# Packages whose classes do not look up functions of a host.
_PLAIN = ("torch", "builtins", "collections", "typing", "abc", "deformkit")


@dataclass(frozen=True)
class Replacement:
    """One part of a host library, and how it was replaced."""

    host: str
    """The class or function, with the module that defines it."""
    operator: str
    """The function or layer of deformkit that replaces it."""
    count: int
    """The number of instances of the class, or of modules that hold the function or look it up."""
    shared: str | None = None
    """The name under which the function was replaced for all models; None if only this model changed."""

    def __str__(self) -> str:
        name = "that name" if self.shared == self.host else self.shared
        place = "in this model alone" if name is None else f"under {name} for every model that looks it up"
        return f"{self.count} x {self.host} by deformkit.{self.operator}, {place}"


@dataclass(frozen=True)
class Patch:
    """The result of :func:`patch`; print it."""

    model: nn.Module = field(repr=False)
    replaced: tuple[Replacement, ...]
    already: tuple[Replacement, ...] = ()
    """The parts that an earlier call had replaced in this model."""

    def __str__(self) -> str:
        lines = [f"replaced {replacement}" for replacement in self.replaced]
        lines += [f"already replaced {replacement}" for replacement in self.already]
        return "\n".join(lines) or "replaced nothing"


@dataclass
class _Shared:
    """A name in a namespace of a host under which our function is found, and the models that need it."""

    namespace: Any
    name: str
    original: Any
    ours: Any
    users: set[ref[nn.Module]] = field(default_factory=set)

    def used(self) -> bool:
        """Whether a model that needs it still exists."""
        return any(user() is not None for user in self.users)


_shared: dict[str, _Shared] = {}

# One thread at a time patches. The deletion of a patched model may interrupt it, even in its own thread.
_lock = RLock()
_working: list[None] = []
_gone: list[None] = []


def patch(model: nn.Module, strict: bool = True) -> Patch:
    """Replace the deformable layers and functions of a host library in a model by those of deformkit, in place.

    The outputs of the model are the same up to rounding. Parameters, state-dict, ``isinstance`` and ``repr`` do not
    change.

    If a part is a layer or an attribute of a layer, only this model changes. A function that the code of the host looks
    up by name is replaced under that name for every model that uses this code, until the last patched model is restored
    or deleted; the returned description says so. Copies and pickles of a replaced layer are replaced too. A second call
    changes nothing and says so. Threads may call ``patch`` at the same time. Patch a model before ``torch.compile``. No
    host library is imported.

    Args:
        model: a module that is, or contains, modules of transformers, torchvision, mmcv, ultralytics, rfdetr,
            Deformable DETR, deformable-attention, MONAI or voxelmorph.
        strict: whether to raise an error if there is nothing to replace.

    Returns:
        A description of what was replaced; print it, or pass it to :func:`unpatch`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``strict``, and there is nothing to replace.

    Example:
        >>> import torch
        >>> print(patch(torch.nn.Linear(2, 2), strict=False))
        replaced nothing
    """
    _check_module(model)
    with _alone():
        result = _patch(model)
    if strict and not result.replaced and not result.already:
        raise ValueError(
            f"model is a {type(model).__name__} without any deformable part of {HOSTS} that patch knows; "
            f"with strict=False that is no error{_compiled_hint(model)}"
        )
    return result


def _patch(model: nn.Module) -> Patch:
    already, replaced = Counter[tuple[str, str, str | None]](), Counter[tuple[str, str, str | None]]()
    types = Counter[type]()
    for module in model.modules():
        before = vars(module).get(_BEFORE, {})
        already.update(_described(value) for value in before.values())
        changes = [change for change in _changes(module) if change[0] not in before]
        for name, value, ours in changes:
            vars(module).setdefault(_BEFORE, {})[name] = value
            setattr(module, name, ours)
            replaced[_described(value)] += 1
        if "__class__" not in vars(module).get(_BEFORE, {}):
            types[type(module)] += 1
    user = ref(model, _forget)
    known = {place for place, shared in _shared.items() if user in shared.users}
    for cls, count in types.items():
        for namespace, name in _lookups(cls):
            place = f"{namespace.__name__}.{name}"
            original = getattr(namespace, name)
            # Other code may have restored the function of the host in the meantime.
            if place not in _shared or original is not _shared[place].ours:
                _shared[place] = _Shared(namespace, name, original, _function(original))
                setattr(namespace, name, _shared[place].ours)
            _shared[place].users.add(user)
            counter = already if place in known else replaced
            counter[(*_described(_shared[place].original)[:2], place)] += count
    return Patch(model, _replacements(replaced), _replacements(already))


def unpatch(model: nn.Module | Patch) -> None:
    """Undo :func:`patch`: restore the layers and functions of the host library in ``model``.

    This also works for copies and unpickled copies of a patched model. A function that was replaced under its name is
    restored with the last patched model that uses it. A model that is not patched does not change.

    Args:
        model: the module, or the result of :func:`patch`.

    Raises:
        TypeError: ``model`` is neither of these.

    Example:
        >>> import torch
        >>> done = patch(torch.nn.Linear(2, 2), strict=False)
        >>> unpatch(done)
    """
    model = model.model if isinstance(model, Patch) else model
    _check_module(model)
    with _alone():
        for module in model.modules():
            for name, value in vars(module).pop(_BEFORE, {}).items():
                setattr(module, name, value)
            for shared in _shared.values():
                shared.users.discard(ref(module))
        _put_back()


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other threads from patching, and postpone the clean-up for models that are deleted meanwhile."""
    with _lock:
        _working.append(None)
        try:
            yield
        finally:
            _working.pop()
    _forget_gone()


def _forget(user: ref[nn.Module]) -> None:
    """Called when a model that used a replaced function is deleted, in any thread and at any time."""
    _gone.append(None)
    _forget_gone()


def _forget_gone() -> None:
    # Waiting for the lock could deadlock here. The thread that holds it cleans up when it is done.
    while _gone and _lock.acquire(blocking=False):
        try:
            if _working:
                return
            _gone.clear()
            _put_back()
        finally:
            _lock.release()


def _put_back() -> None:
    """Restore the functions of the hosts that no patched model needs any more."""
    for place, shared in list(_shared.items()):
        if not shared.used():
            del _shared[place]
            # A function that other code has put there after us stays.
            if getattr(shared.namespace, shared.name, None) is shared.ours:
                setattr(shared.namespace, shared.name, shared.original)


def _compiled_hint(model: nn.Module) -> str:
    """The end of a message about a compiled model, which must be patched before; else empty."""
    # A compiled module exists only if the compiler, whose import takes more than a second, was imported.
    optimized = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    made_by: dict[Any, str] = {
        optimized: "torch.compile",
        torch.jit.ScriptModule: "torch.jit.script or torch.jit.trace",
        GraphModule: "torch.export or torch.fx",
    }
    for kind, maker in made_by.items():
        if any(isinstance(module, kind) for module in model.modules()):
            return f"; part of it comes from {maker}: patch the model before that"
    return ""


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")


def _changes(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """The attributes of this instance to change: name, present value and new value."""
    attributes, cls = vars(module), cast(Any, type(module))
    if _replaceable(module):
        yield "__class__", cls, _swapped(cls)
    for name, value in attributes.items():
        if _part(value):
            yield name, value, _function(value)


def _replaceable(module: Any) -> bool:
    """Whether this is a layer of a host whose forward and core are those of its class."""
    plain = isinstance(module, nn.Module) and "forward" not in vars(module)
    part = _layer(type(module)) if plain else None
    if part is None or (part.only is not None and not part.only(module)):
        return False
    return part.core is None or _replaceable(getattr(module, part.core, None))


def _layer(cls: type) -> Part | None:
    """The part that defines the forward of ``cls``; a subclass with a forward of its own is another layer.

    So is a layer of another release whose forward takes arguments that ours does not have.
    """
    definer: Any = next((base for base in cls.__mro__ if "forward" in vars(base)), None)
    part = find(LAYERS, definer)
    return part if part and _arguments(definer.forward) <= _arguments(part.function()) else None


def _arguments(function: Any) -> set[str]:
    """The names of the parameters of ``function``."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


@cache
def _swapped(base: Any) -> Any:
    """A subclass of a layer of a host that has our forward and otherwise behaves like the layer."""
    part = _layer(base)
    assert part is not None
    namespace = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**namespace, "forward": part.function(), "__reduce_ex__": _reduce})


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    # A pickle finds a class by its name, which would be the class of the host.
    base = vars(module)[_BEFORE]["__class__"]
    return _empty, (base,), *base.__reduce_ex__(module, max(int(protocol), 2))[2:]


def _empty(base: type) -> Any:
    cls = _swapped(base)
    return cls.__new__(cls)


def _owner(value: Any) -> Any:
    """``value``, or the class of an autograd Function if ``value`` is its bound ``apply``."""
    owner = getattr(value, "__self__", None)
    return owner if isinstance(owner, type) and value.__name__ == "apply" else value


def _part(value: Any) -> Part | None:
    return find(FUNCTIONS, _owner(value)) if isinstance(value, FunctionType | MethodType | type) else None


def _function(value: Any) -> Any:
    """The replacement of a function of a host, of an autograd Function, or of its bound ``apply``."""
    part = _part(value)
    assert part is not None
    function = part.function()
    return type(part.name, (), {"apply": staticmethod(function)}) if isinstance(value, type) else function


def _lookups(cls: type) -> Iterator[tuple[Any, str]]:
    """The namespaces and names in which methods of ``cls`` look up functions of a host, replaced or not."""
    found: dict[str, tuple[Any, str]] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in _PLAIN:
            continue
        for name, method in vars(base).items():
            method = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else None
            # Functions that __init__ looks up are attributes of the instance.
            if isinstance(method, FunctionType) and name != "__init__":
                for chain in _chains(method.__code__, method.__globals__):
                    site = _resolve(method.__globals__, chain)
                    if site:
                        found[f"{site[0].__name__}.{site[1]}"] = site
    yield from found.values()


def _leads_on(value: Any) -> bool:
    """Whether a global name with this value, or one of its attributes, may be a function of a host."""
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in PACKAGES
    return _part(value) is not None or any(shared.ours is value for shared in _shared.values())


def _chains(code: CodeType, names: dict[str, Any]) -> Iterator[list[str]]:
    """The global names that ``code`` reads, with the attributes read of them, as in ``["torchvision", "ops"]``."""
    chain: list[str] = []
    # Disassembly is slow, and most code reads no such name.
    worthwhile = any(_leads_on(names[name]) for name in code.co_names if name in names)
    for instruction in dis.get_instructions(code) if worthwhile else ():
        if instruction.opname == "LOAD_GLOBAL":
            if chain:
                yield chain
            chain = [instruction.argval]
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(instruction.argval)
        elif chain:
            yield chain
            chain = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant, names)


def _resolve(names: dict[str, Any], chain: list[str]) -> tuple[Any, str] | None:
    """The module and the name in ``chain`` at which a function of a host is found, if any."""
    namespace = sys.modules.get(names.get("__name__", ""))
    for name in chain:
        value = vars(namespace).get(name) if isinstance(namespace, ModuleType) else None
        shared = _shared.get(f"{namespace.__name__}.{name}") if value is not None and namespace is not None else None
        if _part(value) or (shared and shared.ours is value):
            return namespace, name
        namespace = value if isinstance(value, ModuleType) else None
    return None


def _described(value: Any) -> tuple[str, str, str | None]:
    """The name of a function or layer of a host, and the name of the operator that replaces it."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        value = next(base for base in value.__mro__ if "forward" in vars(base))
        part = find(LAYERS, value)
    else:
        value, part = _owner(value), _part(value)
    assert part is not None
    return f"{value.__module__}.{value.__name__}", part.operator, None


def _replacements(counts: Counter[tuple[str, str, str | None]]) -> tuple[Replacement, ...]:
    return tuple(Replacement(host, operator, count, place) for (host, operator, place), count in counts.items())
