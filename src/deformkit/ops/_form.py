"""The form in which the operators appear in a model that is being exported.

- ``""``: as operators of deformkit.
- ``"plain"``: as the tensor operations of their references.
- ``"standard"``: likewise, but two-dimensional convolutions stay operators, for which ONNX has a node.
- ``"gridsample"``: as ``"standard"``, and references sample images by :func:`torch.nn.functional.grid_sample`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from . import _torch

Form = Literal["", "plain", "standard", "gridsample"]


class NoPlainForm(ValueError):
    """A call has no form in plain tensor operations, because their number would depend on the values of tensors."""


_requested: ContextVar[Form] = ContextVar("form", default="")


@contextmanager
def exported_as(form: Form) -> Iterator[None]:
    """In this context the operators appear in ``form``."""
    token = _requested.set(form)
    try:
        yield
    finally:
        _requested.reset(token)


@_torch.constant
def current() -> Form:
    """The form that was requested; the exporters of ONNX, which know no operators but their own, get the plain one."""
    return _requested.get() or ("plain" if _torch.exporting_to_onnx() else "")


def is_standard(name: str, axes: int, boundary: int) -> bool:
    """Whether ONNX has a node for this call of the operator ``name``: a convolution of images padded with zeros."""
    return name == "deform_conv" and axes == 2 and boundary == 0
