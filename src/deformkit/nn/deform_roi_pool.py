"""Layers of deformable RoI pooling: offsets given, or predicted by the layer itself ("packed")."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._shape import check_count, check_tensor, ntuple
from ..ops.deform_roi_pool.op import check_numbers, deform_roi_pool, grid_of
from ._public import named_elsewhere


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling; ``forward`` takes the offsets, if any. See :func:`deformkit.deform_roi_pool`.

    ``output[r, c, bin] = mean over i of sample(input[b_r, c], p[r, bin, i])``, where along each axis
    ``p = start + gamma * length * offset[r, bin] + (bin + (i + 1/2) / n) * length / output_size``

    Args:
        output_size: number of bins along each axis of the input, one int for all axes or N ints.
        spatial_scale: number of pixels of the input in one unit of the RoIs, such as 1/16.
        sampling_ratio: n, the number of samples in a bin along each axis; 0: the length of the bin in pixels, rounded
            up.
        gamma: distance by which an offset of 1 moves a bin, relative to the length of its RoI.
        spatial_dims: N, the number of axes of a RoI: 1, 2 or 3.
        group_size: the number of cells along each axis of a RoI that have channels of their own, for position-sensitive
            pooling: ``input`` has ``prod(group_size)`` times as many channels as the output. None: not
            position-sensitive.

    Shapes of ``forward(input, rois, offset=None)``:
        ``input [B, C, *S]``; ``rois [R, 1 + 2N]``: the index of the image, then the corners, **x first**, float32
        (float64 with a float64 input); ``offset [R, N, *output_size]``, **x first**; output ``[R, C, *output_size]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value, a shape or a batch index does not fit; the message names the argument.

    Example:
        >>> layer = DeformRoIPool(7, spatial_scale=1 / 16)
        >>> rois = torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0], [1.0, 0.0, 0.0, 480.0, 320.0]])
        >>> layer(torch.randn(2, 8, 20, 30), rois).shape
        torch.Size([2, 8, 7, 7])

    Paper: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211.
    """

    @named_elsewhere(out_size="output_size", trans_std="gamma")
    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        spatial_dims: int = 2,
        group_size: int | Sequence[int] | None = None,
    ) -> None:
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims!r}; it must be 1, 2 or 3")
        check_numbers(spatial_scale, sampling_ratio, gamma)
        super().__init__()
        self.output_size = tuple(ntuple(output_size, spatial_dims, "output_size", 1))
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        self.spatial_dims = spatial_dims
        self.group_size = grid_of(group_size, spatial_dims) or None

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """Compute the means over the bins of each RoI, which ``offset`` moves."""
        return self._pool(input, rois, offset)

    def extra_repr(self) -> str:
        """The arguments; ``spatial_dims`` only if it is not 2, and ``group_size`` only if there is one."""
        names = ["output_size", "spatial_scale", "sampling_ratio", "gamma"]
        if self.spatial_dims != 2:
            names.append("spatial_dims")
        if self.group_size is not None:
            names.append("group_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _pool(self, input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
        # The operator takes the number of axes from the input and would accept another one.
        check_tensor("input", input)
        if input.dim() != self.spatial_dims + 2:
            raise ValueError(f"input has shape {list(input.shape)}; it must have {self.spatial_dims + 2} axes")
        return deform_roi_pool(
            input,
            rois,
            offset,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
            group_size=self.group_size,
        )


class PackedDeformRoIPool(DeformRoIPool):
    """Deformable RoI pooling that predicts its offsets, and a mask for its output if ``modulated``.

    ``output = pool(input, rois, offset_fc(plain)) * mask_fc(plain)`` with ``plain = pool(input, rois)``

    Each RoI is pooled once without offsets. Fully connected layers predict its offsets and its mask from all of its
    bins and channels. The last layer of both is initialised to zero: a new layer computes plain pooling, or half of it
    if modulated, because the mask is ``sigmoid(0) = 1/2``. The parameters have the names and the order of mmcv's
    ``DeformRoIPoolPack`` and ``ModulatedDeformRoIPoolPack``. With ``modulated=True`` and a ``group_size`` it is the
    ``DCNPooling`` of DCNv2.

    Args:
        output_size: number of bins. Parameters that are not described here are as in :class:`DeformRoIPool`.
        output_channels: C, channels of the output; of the input, too, unless pooling is position-sensitive.
        deform_fc_channels: width of the fully connected layers.
        modulated: whether to multiply each bin by a predicted mask between 0 and 1.
        device: the device of the parameters.
        dtype: the dtype of the parameters.

    Shapes of ``forward(input, rois)``:
        ``input [B, C, *S]``; ``rois [R, 1 + 2N]`` as in :class:`DeformRoIPool`; output ``[R, C, *output_size]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a value, a shape or a batch index does not fit; the message names the argument.

    Example:
        >>> layer = PackedDeformRoIPool(7, 8, spatial_scale=1 / 16, modulated=True)
        >>> rois = torch.tensor([[0.0, 16.0, 32.0, 240.0, 160.0], [1.0, 0.0, 0.0, 480.0, 320.0]])
        >>> layer(torch.randn(2, 8, 20, 30), rois).shape
        torch.Size([2, 8, 7, 7])

    Papers: Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211;
    Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.
    """

    @named_elsewhere(out_size="output_size", out_channels="output_channels", trans_std="gamma")
    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        modulated: bool = False,
        spatial_dims: int = 2,
        group_size: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            output_size, spatial_scale, sampling_ratio, gamma, spatial_dims=spatial_dims, group_size=group_size
        )
        for name, count in (("output_channels", output_channels), ("deform_fc_channels", deform_fc_channels)):
            check_count(name, count)
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        self.modulated = modulated
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        bins, width = prod(self.output_size), deform_fc_channels
        self.offset_fc = nn.Sequential(
            nn.Linear(bins * output_channels, width, **made),
            nn.ReLU(),
            nn.Linear(width, width, **made),
            nn.ReLU(),
            nn.Linear(width, bins * spatial_dims, **made),
        )
        if modulated:
            self.mask_fc = nn.Sequential(
                nn.Linear(bins * output_channels, width, **made),
                nn.ReLU(),
                nn.Linear(width, bins, **made),
                nn.Sigmoid(),
            )
        self._reset_heads()

    def reset_parameters(self) -> None:
        """Initialise the fully connected layers as :class:`torch.nn.Linear` does, and the last ones to zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self._reset_heads()

    def predict(self, input: Tensor, rois: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict the offsets ``[R, N, *output_size]``, **x first**, and the mask ``[R, 1, *output_size]`` or None."""
        plain = self._pool(input, rois, None)
        if plain.shape[1] != self.output_channels:
            raise ValueError(
                f"input has {input.shape[1]} channels; this layer has output_channels={self.output_channels}"
                + (f" and group_size={tuple(self.group_size)}" if self.group_size else "")
            )
        flat = plain.flatten(1)
        offset = self.offset_fc(flat).unflatten(1, (self.spatial_dims, *self.output_size))
        return offset, self.mask_fc(flat).unflatten(1, (1, *self.output_size)) if self.modulated else None

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]  # it predicts the offsets
        """Compute the means over the bins at the predicted offsets, multiplied by the mask."""
        offset, mask = self.predict(input, rois)
        output = self._pool(input, rois, offset)
        return output if mask is None else output * mask

    def extra_repr(self) -> str:
        """The arguments."""
        own = f", output_channels={self.output_channels}, deform_fc_channels={self.deform_fc_channels}"
        return super().extra_repr() + own + (", modulated=True" if self.modulated else "")

    def _reset_heads(self) -> None:
        lasts = [self.offset_fc[4], *([self.mask_fc[2]] if self.modulated else [])]
        for last in lasts:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
