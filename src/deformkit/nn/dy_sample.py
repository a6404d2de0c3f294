"""DySample: upsampling at points that are predicted from the input."""

from torch import Tensor, nn

from ..ops._shape import check_count, compute_dtype
from ..ops.deform_sample.op import deform_sample
from ._field import check_field, positions


class DySample(nn.Module):
    """Upsampling of an image by sampling it at points that it predicts.

    ``output[b, c, o] = sample(input[b, c], (o + 1/2)/scale - 1/2 + offset[b, g, o])``

    where ``g`` is the group of channel ``c``, and ``offset`` is ``1/4 * offset_head(input)``; or, if ``scoped``,
    ``1/2 * offset_head(input) * sigmoid(scope_head(input))``, rearranged to the positions of the output. The heads are
    convolutions with a kernel of one element. Points are clamped into the input. The offsets of a new layer are close
    to 0, so that it interpolates bilinearly.

    Args:
        in_channels: C, channels of the input and of the output.
        scale: factor of the size of both axes.
        groups: number of groups of channels with offsets of their own.
        scoped: whether a second head scales the offsets ("dynamic scope").

    Shapes of ``forward(input)``: ``input [B, C, H, W]``, output ``[B, C, scale*H, scale*W]``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> DySample(16, scale=2)(torch.randn(1, 16, 10, 12)).shape
        torch.Size([1, 16, 20, 24])

    Paper: Learning to Upsample by Learning to Sample, https://arxiv.org/abs/2308.15085.
    """

    def __init__(self, in_channels: int, scale: int = 2, groups: int = 4, scoped: bool = False) -> None:
        super().__init__()
        for name, count in {"in_channels": in_channels, "scale": scale, "groups": groups}.items():
            check_count(name, count)
        if in_channels % groups:
            raise ValueError(f"in_channels is {in_channels}; it must be divisible by groups, which is {groups}")
        self.in_channels, self.scale, self.groups = in_channels, scale, groups
        channels = 2 * groups * scale**2
        self.offset_head = nn.Conv2d(in_channels, channels, 1)
        self.scope_head = nn.Conv2d(in_channels, channels, 1, bias=False) if scoped else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the offsets start close to 0."""
        nn.init.normal_(self.offset_head.weight, std=0.001)
        assert self.offset_head.bias is not None
        nn.init.zeros_(self.offset_head.bias)
        if self.scope_head is not None:
            nn.init.zeros_(self.scope_head.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Upsample ``input``."""
        return deform_sample(input, self.sampling_points(input), boundary="border")

    def sampling_points(self, input: Tensor) -> Tensor:
        """The points in pixels of ``input``, ``[B, G, scale*H, scale*W, 2]`` as (h, w)."""
        check_field("input", input, [2])
        if input.shape[1] != self.in_channels:
            raise ValueError(f"input has {input.shape[1]} channels; this layer has in_channels={self.in_channels}")
        dtype = compute_dtype(input.dtype)
        offset = self.offset_head(input).to(dtype)
        offset = offset / 4 if self.scope_head is None else offset * self.scope_head(input).to(dtype).sigmoid() / 2
        # F.pixel_shuffle fails in the backward pass of an empty batch.
        fine = offset.unflatten(1, (self.groups, 2, self.scale, self.scale)).permute(0, 1, 2, 5, 3, 6, 4)
        offset = fine.flatten(3, 4).flatten(4, 5).movedim(2, -1)
        return (positions(offset.shape[2:-1], dtype, input.device) + 0.5) / self.scale - 0.5 + offset

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{self.in_channels}, scale={self.scale}, groups={self.groups}, scoped={self.scope_head is not None}"
