"""Names of an extension that deformkit does not provide."""

from collections.abc import Callable
from typing import Any, NoReturn


def missing(module: str, name: str) -> Callable[..., NoReturn]:
    """A function in place of ``module.name``, which raises when it is called.

    Raises:
        AttributeError: ``name`` is one that Python itself looks for in a module.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{module}.{name} was called; deformkit stands in for {module} and provides only its deformable operators"
        )

    function.__name__ = function.__qualname__ = name
    return function
