"""Deformable correlation: the public function, its checks, and the registration."""

from collections.abc import Sequence

from torch import Tensor

from .. import _script
from .._adjoint import RESULT, define_adjoint
from .._levels import SpatialShapes, check_counts, check_levels, located_levels, over_heads_and_levels
from .._public import public
from .._shape import Mode, check_alike, check_floating, check_tensor, code_of
from .._suspect import warn_of_location_units
from . import reference


@public(_script.deform_correlate)
def deform_correlate(
    query: Tensor,
    key: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    mode: Mode = "linear",
) -> Tensor:
    """Deformable correlation: the scalar product of every query with the key sampled at each of its points.

    ``output[b, q, h, l, p] = sum over d of
    query[b, q, h, d] * sample(level_l[b, h, d], sampling_locations[b, q, h, l, p] * size_l - 1/2)``

    where ``level_l`` is the part of ``key`` that belongs to level l, as a map of ``size_l``, and ``sample`` is
    multilinear interpolation. This is the adjoint of :func:`ms_deform_attn` by its ``attention_weights``: with
    ``value=key``, the scalar product of its output with ``query`` is that of its weights with this output. The products
    are not scaled.

    Args:
        query: ``[B, Q, H, D]``; float16, bfloat16, float32 or float64.
        key: ``[B, S, H, D]`` in the dtype of ``query``: the levels, each flattened in row-major order, one after the
            other.
        spatial_shapes: the size of each level in tensor-axis order: L tuples of N ints, ``(h, w)`` for images, or L
            ints if N = 1; their products add up to S. A tensor ``[L, N]`` of integers is also accepted. Its values are
            read, so the call waits for its device and cannot be compiled.
        sampling_locations: ``[B, Q, H, L, P, N]``, **x first**: ``(x, y)`` for images, ``(x, y, z)`` for volumes.
            Normalised: 0 is the outer edge of the first pixel of a level, 1 that of the last. float64 if ``query`` is
            float64, else float32. Or ``[B, Q, H, P, N]`` with the points of all levels one after the other, and
            ``num_points``. An axis H or L of length 1 is shared by all heads or levels; heads are not copied.
        num_points: with locations in the second form, the number of points on each level, which may be 0, or one int
            for all levels.
        mode: ``"linear"``; or ``"nearest"``: the pixel at ``floor(sampling_locations * size_l + 1/2)``, clamped into
            the level, without a gradient by the location.

    Returns:
        ``[B, Q, H, L, P]``, or ``[B, Q, H, P]`` with locations in the second form, in the dtype of ``query``,
        accumulated in float32, or float64 for float64. Pixels outside a level are 0. A NaN location gives NaN at its
        point and in its gradient. A location at infinity is outside.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: a shape, device, size or option does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> shapes = [(32, 48), (16, 24)]
        >>> query, key = torch.randn(2, 100, 8, 16), torch.randn(2, 32 * 48 + 16 * 24, 8, 16)
        >>> locations = torch.rand(2, 100, 8, 2, 4, 2)
        >>> deform_correlate(query, key, shapes, locations).shape
        torch.Size([2, 100, 8, 2, 4])

    Paper: the lookup of RAFT, https://arxiv.org/abs/2003.12039, at points given as in Deformable DETR.
    """
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("sampling_locations", sampling_locations)
    if query.dim() != 4:
        raise ValueError(f"query has shape {list(query.shape)}; it must be [B, Q, H, D]")
    if key.dim() == 4 and query.shape[2:] != key.shape[2:]:
        raise ValueError(
            f"query has shape {list(query.shape)}; with key of shape {list(key.shape)} it must have "
            f"{key.shape[2]} heads of {key.shape[3]} channels"
        )
    sizes, points = located_levels(spatial_shapes, sampling_locations, num_points)
    has_levels, levels = sampling_locations.dim() == 6, len(sizes)
    locations = over_heads_and_levels(sampling_locations, query.shape[2], levels, has_levels)
    flat_sizes = [length for size in sizes for length in size]
    args = (query.flatten(2), key, flat_sizes, locations, points, code_of("mode", mode))
    output = _operator.checked_call(*args)
    warn_of_location_units(locations)
    return output.reshape(*output.shape[:3], levels, sampling_locations.shape[4]) if has_levels else output


def _check(
    query: Tensor,
    key: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    num_points: Sequence[int],
    mode: int,
) -> list[int]:
    """Check every argument in the form that the operator takes; return the shape of the output."""
    check_floating("query", query)
    check_alike("key", key, "query", query)
    check_alike("sampling_locations", sampling_locations, "query", query, dtype=False)
    check_levels("key", key, spatial_shapes, sampling_locations, num_points, mode)
    batch, _, heads, channels = key.shape
    if query.dim() != 3 or query.shape[2] != heads * channels:
        raise ValueError(
            f"query has shape {list(query.shape)}; it must be [B, Q, {heads * channels}], for {heads} heads of "
            f"{channels} channels"
        )
    check_counts("query", query, "key", (batch,))
    check_counts("query", query, "sampling_locations", (None, sampling_locations.shape[1]))
    return list(sampling_locations.shape[:4])


_operator = define_adjoint(
    "deform_correlate(Tensor query, Tensor key, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "int[] num_points, int mode) -> Tensor",
    of="ms_deform_attn",
    arguments=("key", "spatial_shapes", "sampling_locations", RESULT, "num_points", "mode"),
    reference=reference.deform_correlate,
    check=_check,
    differentiable=("query", "key", "sampling_locations"),
    coordinates=("sampling_locations",),
    batched=("query", "key", "sampling_locations"),
)
