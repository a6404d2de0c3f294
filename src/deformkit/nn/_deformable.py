"""What the layers of deformable convolution, plain and transposed, have in common: their checks."""

from math import prod
from typing import Any, ClassVar

from torch import Tensor

from ..ops._shape import Boundary, check_count, check_tensor, counted, times, unsplit_hint
from ._public import of_class, with_hints


class Deformable:
    """A mixin for a subclass of torch's base of all convolutions, which has the other attributes."""

    spatial_dims: ClassVar[int]
    kernel_size: tuple[int, ...]
    in_channels: int
    offset_groups: int
    boundary: Boundary

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # When arguments are wrong, Python's message has the name under which the function was defined.
        if cls.__module__.startswith(__package__) and not cls.__name__.startswith("_"):
            cls.__init__ = with_hints(of_class(cls, "__init__"), cls.__name__)  # type: ignore[method-assign]
            cls.forward = of_class(cls, "forward")  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """The arguments that the base class in torch shows, then others that are not at their defaults."""
        text = super().extra_repr()  # type: ignore[misc]
        if self.offset_groups != 1:
            text += f", offset_groups={self.offset_groups}"
        if self.boundary != "zeros":
            text += f", boundary={self.boundary}"
        return text

    def _is_unbatched(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> bool:
        """Check the tensors of a call against the layer and one another; return whether they have no batch axis."""
        self._check_input(input)
        for name, value in (("offset", offset), ("mask", mask)):
            if value is None and name == "mask":
                continue
            check_tensor(name, value)
            assert value is not None
            if value.dim() != input.dim():
                raise ValueError(f"{name} has shape {list(value.shape)}; it must have {input.dim()} axes, as input has")
        if input.dim() == self.spatial_dims + 1:
            return True
        self._check_offset_channels(offset)
        return False

    def _check_input(self, input: Tensor) -> None:
        """Raise unless ``input`` fits the layer; the operator would derive other groups from other channels."""
        axes = self.spatial_dims
        check_tensor("input", input)
        if input.dim() not in (axes + 1, axes + 2):
            raise ValueError(
                f"input has shape {list(input.shape)}; it must have {axes + 2} axes, or {axes + 1} unbatched"
            )
        unbatched = input.dim() == axes + 1
        if input.shape[-axes - 1] != self.in_channels:
            hint = f"; its {axes + 1} axes are taken as {axes} spatial ones and channels, without a batch"
            raise ValueError(
                f"input has {input.shape[-axes - 1]} channels; this layer has in_channels={self.in_channels}"
                f"{hint if unbatched else ''}"
            )

    def _check_offset_channels(self, offset: Tensor) -> None:
        axes, taps, groups = self.spatial_dims, prod(self.kernel_size), self.offset_groups
        if offset.shape[1] != groups * taps * axes:
            raise ValueError(
                f"offset has {offset.shape[1]} channels; a {times(self.kernel_size)} kernel with "
                f"{counted(groups, 'offset group')} needs {groups * taps * axes} = {counted(groups, 'group')} x "
                f"{counted(taps, 'tap')} x {counted(axes, 'coordinate')}{unsplit_hint(offset.shape[1], taps, axes)}"
            )


def check_channels(in_channels: int, out_channels: int, groups: int, offset_groups: int, of: str) -> None:
    """Raise unless groups divide the channels, and offset groups those called ``of``."""
    counts = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "groups": groups,
        "offset_groups": offset_groups,
    }
    for name, count in counts.items():
        check_count(name, count)
    for name, divisor in (("in_channels", "groups"), ("out_channels", "groups"), (of, "offset_groups")):
        if counts[name] % counts[divisor]:
            raise ValueError(f"{name} is {counts[name]}; it must be divisible by {divisor}, which is {counts[divisor]}")
