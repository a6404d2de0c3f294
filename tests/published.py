"""The formulas of host libraries that cannot be installed, in their own layouts, one tap after the other."""

from collections.abc import Sequence
from itertools import product
from math import ceil, floor, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = Sequence[int]


def linear(field: Tensor, *coordinates: Tensor) -> Tensor:
    """The channels of ``field [B, C, *S]`` at points ``[B, *out]`` in pixels, in tensor-axis order, zero outside."""
    sizes = field.shape[2:]
    grid = torch.stack([(2 * x + 1) / size - 1 for x, size in zip(coordinates, sizes, strict=True)][::-1], -1)
    return F.grid_sample(field, grid, align_corners=False)


bilinear = linear


def modulated_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    deform_groups: int,
) -> Tensor:
    """The formula of mmcv and DCNv2, for images and volumes.

    For images, channel ``2 * (group * taps + tap)`` of the offsets is y, the next one x.
    """
    kernel, out = weight.shape[2:], offset.shape[2:]
    axes, convolve = len(kernel), {2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    bases = torch.meshgrid(
        *((torch.arange(n) * s - p).to(offset) for n, s, p in zip(out, stride, padding, strict=True)), indexing="ij"
    )
    output = torch.zeros(input.shape[0], weight.shape[0], *out, dtype=input.dtype)
    by_group = input.chunk(deform_groups, 1)
    for tap, index in enumerate(product(*map(range, kernel))):
        samples = []
        for group, field in enumerate(by_group):
            number = group * prod(kernel) + tap
            shifts = offset[:, axes * number : axes * (number + 1)].unbind(1)
            places = [b + i * d + s for b, i, d, s in zip(bases, index, dilation, shifts, strict=True)]
            value = linear(field, *places)
            samples.append(value if mask is None else value * mask[:, number].unsqueeze(1))
        by_tap = weight[(slice(None), slice(None), *index)].reshape(*weight.shape[:2], *[1] * axes)
        output = output + convolve(torch.cat(samples, 1), by_tap, groups=groups)
    return output if bias is None else output + bias.reshape(-1, *[1] * axes)


def aggregate(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Pair,
    stride: Pair,
    pad: Pair,
    dilation: Pair,
    group: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """The formula of DCNv3 and DCNv4, with channels last and taps in column-major order.

    ``offset [N, Hout, Wout, G, K, 2]`` are (x, y), ``mask [N, Hout, Wout, G, K]``.
    """
    rows, columns = offset.shape[1:3]
    half_y, half_x = (d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    base_y = (torch.arange(rows) * stride[0] - pad[0] + half_y).to(offset).reshape(-1, 1)
    base_x = (torch.arange(columns) * stride[1] - pad[1] + half_x).to(offset)
    outputs = []
    for g, field in enumerate(input.permute(0, 3, 1, 2).chunk(group, 1)):
        total, tap = torch.zeros(()), 0
        for i in range(kernel[1]):
            for j in range(kernel[0]):
                if remove_center and (i, j) == (kernel[1] // 2, kernel[0] // 2):
                    continue
                x = base_x + offset_scale * (i * dilation[1] - half_x + offset[:, :, :, g, tap, 0])
                y = base_y + offset_scale * (j * dilation[0] - half_y + offset[:, :, :, g, tap, 1])
                total = total + bilinear(field, y, x) * mask[:, :, :, g, tap].unsqueeze(1)
                tap += 1
        outputs.append(total)
    return torch.cat(outputs, 1).permute(0, 2, 3, 1)


def deformable_attention(layer: Any, x: Tensor, vgrid: Tensor) -> Tensor:
    """The output of a layer of the package deformable-attention for a moved grid ``[B*G, N, *grid]``.

    It is normalised, sampled, and attended to with the position bias.
    """
    size, grid, axes = list(x.shape[2:]), list(vgrid.shape[2:]), vgrid.shape[1]
    groups, heads = layer.offset_groups, layer.heads
    # For images the first coordinate is x, and is divided by the height.
    keys = torch.stack([2 * vgrid[:, i] / max(grid[i] - 1, 1) - 1 for i in range(axes)], -1)
    along = torch.meshgrid(*(torch.arange(n).to(x) for n in size), indexing="ij")
    along = along[::-1] if axes == 2 else along
    places = torch.stack([2 * p / max(size[i] - 1, 1) - 1 for i, p in enumerate(along)], -1)

    fields = x.unflatten(1, (groups, -1)).flatten(0, 1)
    if axes == 1:
        rows = torch.cat([torch.zeros_like(keys), keys], -1).unsqueeze(2)
        read = F.grid_sample(fields.unsqueeze(-1), rows, align_corners=False).squeeze(-1)
    else:
        read = F.grid_sample(fields, keys if axes == 2 else keys.flip(-1), align_corners=False)
    read = read.unflatten(0, (-1, groups)).flatten(1, 2)

    distance = places.flatten(0, -2).unsqueeze(1) - keys.flatten(1, -2).unsqueeze(1)
    bias = distance.sign() * (distance.abs() + 1).log() if layer.rel_pos_bias.log_distance else distance
    for part in layer.rel_pos_bias.mlp:
        bias = part(bias)
    bias = bias.unflatten(0, (-1, groups)).movedim(-1, 2).flatten(1, 2)
    q, k, v = (
        t.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
        for t in (layer.to_q(x), layer.to_k(read), layer.to_v(read))
    )
    attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return layer.to_out((attention @ v).transpose(2, 3).flatten(1, 2).unflatten(2, size))


def normalised(displacement: Tensor) -> Tensor:
    """The grid of MONAI and voxelmorph for a displacement in pixels: -1 to 1 over the image, x first."""
    size = displacement.shape[2:]
    along = torch.meshgrid(*(torch.arange(n, dtype=displacement.dtype) for n in size), indexing="ij")
    moved = [d + p for d, p in zip(displacement.unbind(1), along, strict=True)]
    return torch.stack([2 * m / max(n - 1, 1) - 1 for m, n in zip(moved, size, strict=True)][::-1], -1)


def position_sensitive_pool(
    input: Tensor,
    rois: Tensor,
    trans: Tensor | None,
    spatial_scale: float,
    pooled_size: int,
    output_dim: int,
    group_size: int,
    part_size: int,
    sample_per_part: int,
    trans_std: float,
) -> Tensor:
    """The formula of the DCN papers' position-sensitive RoI pooling as DCNv2 computes it, sample by sample.

    ``trans [R, 2 * classes, part_size, part_size]`` are (x, y); corners are rounded, and their last pixel is included.
    """

    def rounded(corner: float) -> int:
        return floor(abs(corner) + 0.5) * (-1 if corner < 0 else 1)

    height, width = input.shape[2:]
    classes = 1 if trans is None else trans.shape[1] // 2
    output = input.new_zeros(len(rois), output_dim, pooled_size, pooled_size)
    for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        start = [rounded(v) * spatial_scale - 0.5 for v in (y1, x1)]
        side = [max((rounded(v) + 1) * spatial_scale - 0.5 - s, 0.1) for v, s in zip((y2, x2), start, strict=True)]
        for c, i, j in product(range(output_dim), range(pooled_size), range(pooled_size)):
            part = [floor(place / pooled_size * part_size) for place in (i, j)]
            cell = [floor(place * group_size / pooled_size) for place in (i, j)]
            field = input[int(image), (c * group_size + cell[0]) * group_size + cell[1]]
            first = c // (output_dim // classes) * 2
            total, count = input.new_zeros(()), 0
            for sub in product(range(sample_per_part), repeat=2):
                at = []
                for axis, place in enumerate((i, j)):
                    bin_side = side[axis] / pooled_size
                    shift = input.new_zeros(()) if trans is None else trans[n, first + 1 - axis, part[0], part[1]]
                    point = place * bin_side + start[axis] + shift * trans_std * side[axis]
                    at.append(point + sub[axis] * bin_side / sample_per_part)
                h, w = at
                if h < -0.5 or w < -0.5 or h > height - 0.5 or w > width - 0.5:
                    continue
                h, w = h.clamp(0, height - 1), w.clamp(0, width - 1)
                top, left, bottom, right = floor(h.item()), floor(w.item()), ceil(h.item()), ceil(w.item())
                upper = field[top, left] * (1 - (w - left)) + field[top, right] * (w - left)
                lower = field[bottom, left] * (1 - (w - left)) + field[bottom, right] * (w - left)
                total, count = total + upper * (1 - (h - top)) + lower * (h - top), count + 1
            output[n, c, i, j] = total / max(count, 1)
    return output
