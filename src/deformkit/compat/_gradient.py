"""Code that the backward functions of the hosts share."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..ops._shape import check_alike, check_floating


def checked_gradient(forward: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad_output: Tensor) -> Tensor:
    """``grad_output`` in the dtype of the output of ``forward``, whose own checks are made first, without computing it.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a tensor of a wrong shape or on a wrong device, by name.
    """
    check_floating("grad_output", grad_output)
    for tensor in tensors:
        if tensor is not None:
            check_alike("an argument of the forward call", tensor, "grad_output", grad_output, dtype=False)
    output = forward(*(tensor if tensor is None else tensor.detach().to("meta") for tensor in tensors))
    if grad_output.shape != output.shape:
        raise ValueError(f"grad_output has shape {list(grad_output.shape)}; the output has {list(output.shape)}")
    return grad_output.to(output.dtype)
