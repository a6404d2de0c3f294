"""The library for ONNX Runtime."""

from pathlib import Path

from .. import __path__ as _roots
from .._kernels import CURE

LIBRARY = "deformkit_onnxruntime.so"


def library() -> str:
    """The path of ``deformkit_onnxruntime.so``, with which ONNX Runtime runs the operators by the kernels of deformkit.

    A session needs it before it loads a file that :func:`export` wrote with ``form="deformkit"``; without it the same
    file runs by its functions of standard operators. The library needs ONNX Runtime 1.17 or later, and neither torch
    nor Python: on a machine without deformkit, copy it together with the files ``deformkit_*.so`` of its folder.

    Returns:
        An absolute path.

    Raises:
        RuntimeError: deformkit was installed without compiled kernels.

    Example:
        >>> library().endswith("deformkit_onnxruntime.so")
        True
    """
    for root in _roots:
        path = Path(root) / "lib" / LIBRARY
        if path.is_file():
            return str(path.resolve())
    raise RuntimeError(f"deformkit was installed without {LIBRARY}. {CURE}")
