"""What the launchers of kernels that sample have in common: arguments of kernels, and what becomes of their sums."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._shape import name_of, prod
from .gpu import Rule, Steps, Strided, Sums


class FieldGradient:
    """Accumulates the gradient of a field in float32.

    With deterministic algorithms, finite amounts are accumulated as integer multiples of a small unit in int64, where
    the order has no effect; non-finite amounts are still accumulated in float32, where order does not affect them.
    """

    def __init__(self, like: Tensor, shape: Sequence[int], wanted: bool, most: Callable[[], Tensor]) -> None:
        """Allocate zeros for a gradient of ``shape`` if it is wanted.

        Args:
            like: a tensor with the device and dtype.
            shape: the shape of the gradient, channels last.
            wanted: whether anything will be added.
            most: an upper bound of the sum of the magnitudes that are added to one element: one number in float64.
        """
        self._dtype = like.dtype
        self.exact = wanted and torch.are_deterministic_algorithms_enabled()
        self.sums: Sums | None = None
        """What kernels add to, or None where the gradient is not wanted."""
        if wanted:
            units = like.new_zeros(shape, dtype=torch.int64) if self.exact else None
            # A power of two that float32 represents, so that the scaling itself is exact.
            per_one = (62 - most().log2().ceil()).clamp(-100, 120).exp2().float() if self.exact else None
            self.sums = Sums(like.new_zeros(shape, dtype=torch.float32), units, per_one)

    @property
    def vector(self) -> int:
        """The number of columns that a thread should add at once: 128 bits."""
        return 2 if self.exact else 4

    def result(self) -> Tensor | None:
        """The gradient in the dtype of the field; None if it is not wanted."""
        if self.sums is None:
            return None
        floats, units, per_one = self.sums
        if units is not None:
            floats = units.double() / per_one + floats
        return floats.to(self._dtype)


def largest(value: Tensor) -> Tensor:
    """The largest finite magnitude in a tensor, in float64; 0 for an empty one."""
    magnitude = value.detach().abs()
    finite = magnitude.where(magnitude < torch.inf, 0.0).flatten()
    return torch.cat([finite, finite.new_zeros(1)]).amax().double()


def asked_for(grads: Sequence[Tensor | None], output_mask: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as a backward operator returns them: an empty tensor for each that is missing or not requested."""
    pairs = zip(grads, output_mask, strict=True)
    return tuple(grad if asked and grad is not None else like.new_empty(0) for grad, asked in pairs)


def rule(axes: int, boundary: int, mode: int = 0) -> Rule:
    """The rule for the codes of a boundary and of a mode."""
    name = name_of("boundary", boundary)
    return Rule(axes, name == "border", name_of("mode", mode) == "nearest", name == "reflect")


def strided(value: Tensor) -> Strided:
    """A tensor as an argument of kernels."""
    return Strided(value, value.stride())


def lifted(values: Sequence[int], missing: int) -> tuple[int, int, int]:
    """Extend one to three values along the last axes to three, with ``missing`` along the first ones."""
    z, y, x = (*[missing] * (3 - len(values)), *values)
    return z, y, x


def packed(size: Sequence[int]) -> tuple[int, int, int]:
    """A size as an argument of kernels, for :func:`read_size`.

    Triton specialises a kernel on the numbers of a tuple that are 1 or multiples of 16. Odd numbers above 1
    are neither, so that a new image size needs no new kernel.
    """
    z, y, x = (2 * length + 1 for length in lifted(size, 1))
    return z, y, x


def steps(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Steps:
    """The window of a convolution as an argument of kernels."""
    return Steps(lifted(kernel_size, 1), lifted(stride, 1), lifted(padding, 0), lifted(dilation, 1))


def largest_index(size: Sequence[int], out_size: Sequence[int], padding: Sequence[int] = ()) -> int:
    """The largest number that kernels store in 32 bits for fields and outputs of these sizes."""
    padded = [length + 2 * p for length, p in zip(size, padding or [0] * len(size), strict=True)]
    return max(prod(size), prod(out_size), *padded, *packed(size), *packed(out_size))
