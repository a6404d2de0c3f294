"""Export to runtimes that do not have deformkit's operators."""

from collections.abc import Iterator
from contextlib import contextmanager

from .ops._form import exported_as


@contextmanager
def decomposed() -> Iterator[None]:
    """In this context the operators are computed, and traced, in plain tensor operations.

    A model that is exported in this context contains no operator of deformkit: every runtime that has the ordinary
    operations of PyTorch, such as ``gather`` and ``matmul``, can take it. Results are those of the operators within
    rounding, in the time and the memory of the reference implementation.

    Sizes may be dynamic. No tensor has more than five axes, except for arguments and results that have more, such as
    those of :func:`~deformkit.deform_aggregate` in three dimensions. :func:`~deformkit.deform_roi_pool` needs a
    ``sampling_ratio`` of at least 1: with 0 the number of its operations depends on the regions.

    The exporters of ``torch.onnx`` need no such context: what they export is always in plain operations. See also
    :func:`deformkit.onnx.export`.

    Example:
        >>> import torch, deformkit
        >>> layer = deformkit.nn.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> with decomposed():
        ...     program = torch.export.export(layer, (torch.randn(1, 3, 8, 8),))
        >>> any("deformkit" in str(node.target) for node in program.graph.nodes)
        False
    """
    with exported_as("plain"):
        yield
