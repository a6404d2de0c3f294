"""The layers of deformops before its release 3, as its README describes them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ...nn._linear import linear
from ...ops._levels import SpatialShapes
from ...ops._shape import check_choice, check_tensor
from ._attention import MultiScale
from ._sampling import Project, Sampling, ScaleLinear, project, reset_projections

__all__ = ["DeformAttn2d", "DeformConv2d", "FusedMSDeformAttn2d", "MSDeformAttn2d"]

_METHODS = ("linear", "softmax", "rectified")


class DeformConv2d(Sampling):
    """Deformable aggregation of an image with predicted offsets and masks; a mixture of DCNv3 and DCNv4.

    ``offset, mask = offset_pointwise(offset_depthwise(input))`` at the centre of each window; then

    ``output = activation(norm(proj_output(deform_aggregate(proj_input(input), offset, mask))))``

    Unlike a convolution it has no weights over taps and channels: ``mask`` weighs the taps, ``proj_output`` mixes the
    channels. With ``center_feature_scale`` a share ``s = sigmoid(linear(aggregated))`` of each group is the projected
    input at the centre of the window. The names of the parameters, and the layout of the heads, are those of deformops.

    Args:
        dims: C, channels of the input and of the output; any multiple of ``groups``.
        kernel_size: number of taps along each axis, odd.
        stride: step of the output positions, in pixels.
        padding: distance of the first tap from the edge of the input, in pixels; ``"same"`` keeps the size at stride 1.
        dilation: distance between two taps, in pixels.
        groups: number of groups of channels; each has its own offsets and masks.
        offset_scale: factor of the distance of each tap from the centre of its window.
        center_feature_scale: whether to blend in the centre; see above.
        remove_center: whether to leave out the middle tap.
        project: makes ``proj_input`` and ``proj_output`` as ``project(dims, dims)``; None: there are none.
        softmax: whether the masks of a group are a softmax over its taps.
        norm: applied to the output in its own layout, or None.
        activation: applied after the norm, or None.

    Shapes of ``forward(input, shape=None)``: ``input [N, C, H, W]``, output ``[N, C, Hout, Wout]``; or tokens
    ``[N, H*W, C]`` with ``shape=(H, W)``, output ``[N, Hout*Wout, C]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformConv2d(16)
        >>> layer(torch.randn(4, 16, 32, 64)).shape
        torch.Size([4, 16, 32, 64])
        >>> layer(torch.randn(4, 2048, 16), shape=(32, 64)).shape
        torch.Size([4, 2048, 16])
    """

    def __init__(
        self,
        dims: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same"] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 4,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        project: Project | None = nn.Linear,
        softmax: bool = False,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        window = (kernel_size, stride, padding, dilation, groups, offset_scale)
        super().__init__("dims", dims, *window, center_feature_scale, remove_center, softmax)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size is {kernel_size!r}; it must be odd")
        padding = tuple(k // 2 for k in self.kernel_size)
        depthwise: dict[str, Any] = {"kernel_size": self.kernel_size, "padding": padding}
        self.offset_depthwise = nn.Conv2d(dims, dims, **depthwise, groups=dims)
        self.offset_pointwise = nn.Linear(dims, self._head_size())
        self.proj_input = None if project is None else project(dims, dims)
        self.proj_output = None if project is None else project(dims, dims)
        self.center_scale = ScaleLinear(dims, groups) if center_feature_scale else None
        self.norm, self.activation = norm, activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the head to zero, so that offsets and masks are 0, and the other layers at random.

        The depthwise convolution is random, too. deformops also sets it to zero; then neither of the two ever learns,
        as each has the other as a factor of its gradient.
        """
        for parameter in (*self.offset_depthwise.parameters(), *self.offset_pointwise.parameters()):
            nn.init.zeros_(parameter)
        nn.init.kaiming_normal_(self.offset_depthwise.weight, a=1)
        reset_projections(self.proj_input, self.proj_output)

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Predict offsets ``[N, *out, groups, K, 2]`` and masks ``[N, *out, groups, K]`` for an input ``[N, C, H, W]``.

        Both are in the order of :func:`deformkit.deform_aggregate`: taps in row-major order, coordinates (h, w).
        """
        return self._points(self._head(self._channels_last("input", input, None, "")))

    def forward(self, input: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Compute the output for an input, in its layout."""
        field = self._channels_last("input", input, shape, "shape is")
        self._out_size(field)
        return self._sample(project(self.proj_input, field), self._head(field), input.dim() == 3)

    def _head(self, field: Tensor) -> Tensor:
        features = self.offset_depthwise(field.movedim(-1, 1)).movedim(1, -1)
        return linear(self.offset_pointwise, self._at_centres(features))

    def _split(self, head: Tensor) -> tuple[Tensor, Tensor]:
        offsets = 2 * self._taps
        return head[..., :offsets].unflatten(-1, (-1, 2)), head[..., offsets:]


class DeformAttn2d(MultiScale):
    """Multi-scale deformable attention: every query predicts and samples a few points on every level of a pyramid.

    This is :class:`deformkit.nn.MSDeformAttn` with the parameter names of deformops, other widths of value and output,
    and a choice of the normalisation of the weights.

    Args:
        dim: width of queries, divisible by ``num_heads``.
        dim_value: width of ``v``; None: ``dim``.
        dim_output: width of the output; None: ``dim``.
        num_heads: H.
        num_levels: L, levels of the pyramid.
        num_points: P, points of one head on one level.
        method: ``"softmax"`` over the L*P points of a head; ``"linear"``: as predicted; ``"rectified"``: positive parts
            divided by their sum; or a function of ``[B, Q, H, L*P]``.
        im2col_step: has no effect.

    Shapes of ``forward(q, p, v, shapes, level_index, padding_mask=None)``: ``q [B, Q, dim]``; reference points
    ``p [B, Q, L, 2]``, (x, y) from 0 to 1, or boxes ``[B, Q, L, 4]``, centre and size; ``v [B, S, dim_value]``: the
    levels, each flattened in row-major order, one after the other; ``shapes [L, 2]``, (h, w) of each level, a tensor or
    a list; ``level_index [L]``, where each level starts in ``v``, or None; ``padding_mask [B, S]``, bool, True where
    ``v`` is padding; output ``[B, Q, dim_output]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = DeformAttn2d(64, num_heads=4, num_levels=2)
        >>> pyramid, shapes = torch.randn(2, 32 * 48 + 16 * 24, 64), torch.tensor([[32, 48], [16, 24]])
        >>> layer(torch.randn(2, 100, 64), torch.rand(2, 100, 2, 2), pyramid, shapes, torch.tensor([0, 1536])).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        dim_value: int | None = None,
        dim_output: int | None = None,
        *,
        num_heads: int,
        num_levels: int,
        num_points: int = 4,
        method: Literal["softmax", "linear", "rectified"] | Callable[[Tensor], Tensor] = "softmax",
        im2col_step: int = 128,
    ) -> None:
        super().__init__(dim, dim_value, dim_output, num_heads, num_levels, num_points)
        if not callable(method):
            check_choice("method", method, _METHODS, " or a function")
        self.method = method

    def forward(
        self,
        q: Tensor,
        p: Tensor,
        v: Tensor,
        shapes: SpatialShapes,
        level_index: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the output for every query; see the class for shapes."""
        return self._attend(q, p, v, "shapes", shapes, level_index, padding_mask)

    def _weigh(self, logits: Tensor) -> Tensor:
        if callable(self.method):
            weights = self.method(logits)
            check_tensor("the result of method", weights)
            return weights
        if self.method == "rectified":
            positive = logits.relu()
            return positive / (positive.sum(-1, keepdim=True) + 1e-6)
        return logits.softmax(-1) if self.method == "softmax" else logits


# The README names DeformAttn2d; the code of those releases has these two, the second only with softmax.
MSDeformAttn2d = DeformAttn2d
FusedMSDeformAttn2d = DeformAttn2d
