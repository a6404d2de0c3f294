"""Gives public layers the constructors and methods that they inherit under their own names, and hints for arguments."""

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec

Parameters = ParamSpec("Parameters")


def of_class(cls: type, name: str) -> Any:
    """A copy of the method ``name`` that ``cls`` inherits, with the name of ``cls`` in its error messages."""
    method: Any = getattr(cls, name)
    function = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    function.__kwdefaults__, function.__doc__ = method.__kwdefaults__, method.__doc__
    function.__annotations__, function.__module__ = method.__annotations__, method.__module__
    function.__qualname__ = f"{cls.__qualname__}.{name}"
    return function


def named_elsewhere(**ours: str) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """A decorator of constructors: an argument under the name that another library gives it raises a helpful error.

    Args:
        ours: the name here, by the name elsewhere.
    """

    def decorate(init: Callable[Parameters, None]) -> Callable[Parameters, None]:
        layer = init.__qualname__.split(".")[0]

        @wraps(init)
        def with_hints(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            for name in kwargs.keys() & ours.keys():
                raise TypeError(f"{layer} has no argument {name!r}; it is called {ours[name]!r} here")
            init(*args, **kwargs)

        return with_hints

    return decorate


class OwnNames:
    """A mixin for layers that share a base: public subclasses have its constructor and ``forward`` as their own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # When arguments are wrong, Python's message has the name under which the function was defined.
        if not cls.__name__.startswith("_"):
            cls.__init__ = of_class(cls, "__init__")  # type: ignore[method-assign]
            setattr(cls, "forward", of_class(cls, "forward"))  # noqa: B010
