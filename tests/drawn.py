"""Random configurations of the operators on images, for comparisons with their hosts."""

import random
from typing import Any

from deformkit.ops.deform_conv.cases import Case as Conv
from deformkit.ops.ms_deform_attn.cases import Case as Attention


def conv(seed: int, **fixed: Any) -> Conv:
    """A deformable convolution."""
    source = random.Random(f"conv {seed}")
    kernel = (source.randint(1, 4), source.randint(1, 3))
    dilation = (source.randint(1, 2), source.randint(1, 3))
    size = tuple(d * (k - 1) + source.randint(1, 6) for d, k in zip(dilation, kernel, strict=True))
    groups, offset_groups = source.choice(((1, 1), (1, 2), (2, 1), (2, 4), (4, 4)))
    options: dict[str, Any] = {
        "batch": source.randint(1, 5),
        "channels": 4 * source.randint(1, 3),
        "size": size,
        "out_channels": 4 * source.randint(1, 2),
        "kernel_size": kernel,
        "stride": (source.randint(1, 2), source.randint(1, 3)),
        "padding": (source.randint(0, 2), source.randint(0, 3)),
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
        "modulated": source.random() < 0.5,
        "bias": source.random() < 0.5,
    }
    return Conv("drawn", **{**options, **fixed})


def attention(seed: int) -> Attention:
    """Attention over a pyramid, with the same number of points on each level."""
    source = random.Random(f"attention {seed}")
    sizes = tuple((source.randint(1, 9), source.randint(1, 9)) for _ in range(source.randint(1, 4)))
    points = (source.randint(1, 5),) * len(sizes)
    channels = source.choice((1, 3, 8, 32))
    return Attention(
        "drawn", source.randint(1, 5), sizes, source.randint(1, 20), source.randint(1, 4), channels, points
    )
