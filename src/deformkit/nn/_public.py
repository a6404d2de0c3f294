"""Gives public layers the constructors and methods that they inherit under their own names, and hints for arguments."""

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

# The names that other libraries use, and ours.
_NAMES_ELSEWHERE = {"deform_groups": "offset_groups", "deformable_groups": "offset_groups"}


def of_class(cls: type, name: str) -> Any:
    """A copy of the method ``name`` that ``cls`` inherits, with the name of ``cls`` in its error messages."""
    method: Any = getattr(cls, name)
    function = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    function.__kwdefaults__, function.__doc__ = method.__kwdefaults__, method.__doc__
    function.__annotations__, function.__module__ = method.__annotations__, method.__module__
    function.__qualname__ = f"{cls.__qualname__}.{name}"
    return function


def with_hints(init: Callable[..., None], layer: str) -> Callable[..., None]:
    """``init`` with a helpful error for an argument under the name that other libraries give it."""

    @wraps(init)
    def with_hints(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() & _NAMES_ELSEWHERE.keys():
            raise TypeError(f"{layer} has no argument {name!r}; it is called {_NAMES_ELSEWHERE[name]!r} here")
        init(self, *args, **kwargs)

    return with_hints


class OwnNames:
    """A mixin for layers that share a base: public subclasses have its constructor and ``forward`` as their own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # When arguments are wrong, Python's message has the name under which the function was defined.
        if not cls.__name__.startswith("_"):
            cls.__init__ = of_class(cls, "__init__")  # type: ignore[method-assign]
            cls.forward = of_class(cls, "forward")  # type: ignore[attr-defined]
