"""The layer of multi-scale deformable attention of ``mmcv.ops``."""

from typing import Any

from torch import Tensor
from torch.nn import Dropout, Linear

from ...ops._levels import SpatialShapes
from ...ops._shape import check_tensor
from ..deformable_detr import MSDeformAttn


class MultiScaleDeformableAttention(MSDeformAttn):
    """The layer ``mmcv.ops.MultiScaleDeformableAttention``, with its residual connection and its dropout.

    ``dropout(MSDeformAttn(query + query_pos, value)) + identity``, see :class:`deformkit.nn.MSDeformAttn`.
    The arguments, the initialisation and the state-dict are mmcv's.

    Args:
        embed_dims: width of queries, values and outputs.
        num_heads: H; it divides the width of the projected values.
        num_levels: L, levels of the pyramid.
        num_points: P, points of one head on one level.
        im2col_step: has no effect.
        dropout: probability of setting an element of the output to zero in training.
        batch_first: whether the batch is the first axis of queries, values and outputs, or the second.
        norm_cfg: is not used, as in mmcv.
        init_cfg: must be None: there are no initialisers of mmengine here.
        value_proj_ratio: width of the projected values, in ``embed_dims``.

    Shapes of ``forward(query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
    reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs)``, without ``batch_first``:

        * ``query [Q, B, embed_dims]``; ``query_pos`` is added to it, ``identity`` (else the query) to the output;
        * ``value [S, B, embed_dims]``, else the query; ``key`` and any other argument are not used, as in mmcv;
        * ``key_padding_mask [B, S]``: bool, True where the value is padding;
        * ``reference_points [B, Q, L, 2]``, (x, y), or boxes ``[B, Q, L, 4]``; ``spatial_shapes [L, 2]``, (h, w);
        * ``level_start_index [L]``, see :meth:`MultiScaleDeformableAttnFunction.apply`;
        * output ``[Q, B, embed_dims]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value or a shape does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> layer = MultiScaleDeformableAttention(64, num_heads=4, num_levels=1, batch_first=True)
        >>> pyramid, shapes = torch.randn(2, 32 * 48, 64), torch.tensor([[32, 48]])
        >>> where = {"reference_points": torch.rand(2, 100, 1, 2), "spatial_shapes": shapes}
        >>> layer(torch.randn(2, 100, 64), value=pyramid, **where).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Any = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        if init_cfg is not None:
            raise ValueError(f"init_cfg is {init_cfg!r}; it must be None: there are no initialisers of mmengine here")
        super().__init__(embed_dims, num_levels, num_heads, num_points)
        self.embed_dims, self.num_heads = embed_dims, num_heads
        self.num_levels, self.num_points = num_levels, num_points
        self.im2col_step = im2col_step
        self.batch_first = batch_first
        self.norm_cfg = norm_cfg
        self.dropout = Dropout(dropout)
        width = int(embed_dims * value_proj_ratio)
        if width != embed_dims:
            if width < 1 or width % num_heads:
                raise ValueError(
                    f"value_proj_ratio is {value_proj_ratio}, which makes the values {width} wide; "
                    f"that must be divisible by num_heads, which is {num_heads}"
                )
            self.value_proj = Linear(embed_dims, width)
            self.output_proj = Linear(width, embed_dims)
            self.reset_parameters()

    def init_weights(self) -> None:
        """As :meth:`reset_parameters`."""
        self.reset_parameters()

    def forward(  # type: ignore[override]  # the host's arguments
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: SpatialShapes | None = None,
        level_start_index: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the output for every query and add it to the query; see the class for shapes."""
        check_tensor("query", query)
        # Earlier releases of mmcv call this argument residual, which would otherwise be ignored as unknown.
        identity = kwargs.get("residual") if identity is None else identity
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        where = (spatial_shapes, level_start_index, key_padding_mask)
        output = super().forward(query, reference_points, value, *where)  # type: ignore[arg-type]  # checked there
        return self.dropout(output if self.batch_first else output.transpose(0, 1)) + identity
