"""What every public function can do besides computing: be scripted, and leave a call to another type of tensor."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Function = TypeVar("Function", bound=Callable[..., Tensor])


def public(scripted: Callable[..., Tensor]) -> Callable[[Function], Function]:
    """Decorate a public function.

    An argument with ``__torch_function__``, such as a proxy of ``torch.fx``, takes the call, and TorchScript compiles
    ``scripted`` in its place.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if has_torch_function(given):
                return handle_torch_function(whole, given, *args, **kwargs)
            return function(*args, **kwargs)

        whole: Any = call
        # torch.compile counts how often it compiles a code object anew, so that each function needs its own.
        whole.__code__ = whole.__code__.replace(co_name=function.__name__)
        whole.__prepare_scriptable__ = lambda: scripted
        return cast(Function, whole)

    return decorate
