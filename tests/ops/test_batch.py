"""The output and gradients of a batch element are bit-identical alone and in any batch."""

from typing import Any

import pytest
import torch
from rooms import Call, needs_kernel
from torch import Tensor

from deformkit._testing import assert_equal
from deformkit.ops._operator import operators
from deformkit.ops.deform_aggregate.cases import Case as Aggregate
from deformkit.ops.deform_roi_pool.cases import Case as Pool
from deformkit.ops.ms_deform_attn.cases import Case as Attend

LEVELS = ((31, 29), (12, 11), (5, 4))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Few and many heads, rows of every width, fields that are read seldom and often.
HEADS = [
    *(Attend(f"decoder-{h}x{d}", 9, LEVELS, 7, h, d, (2, 1, 2)) for h, d in ((1, 32), (3, 31), (8, 16), (2, 3))),
    *(Attend(f"between-{h}x{d}", 9, LEVELS, 150, h, d, (2, 1, 2)) for h, d in ((1, 32), (8, 17))),
    *(Attend(f"encoder-{h}x{d}", 9, LEVELS, 1100, h, d, (2, 1, 2)) for h, d in ((1, 32), (3, 5), (2, 63))),
    Aggregate("aggregate", 9, (14, 15), 2, 32, (3, 3), padding=1),
    Aggregate("aggregate-strided", 9, (40, 41), 3, 7, (1, 1), stride=5),
]


def both(call: Call, args: list[Any], grad: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    asked = [args[i] is not None for i in call.operator.differentiable]
    return [call.operator(*args), *call.backward_operator(grad, *args, asked)]


@needs_kernel("ms_deform_attn")
@DTYPES
@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_sample_of_heads(case: Any, dtype: torch.dtype) -> None:
    call = Call(operators["ms_deform_attn" if isinstance(case, Attend) else "deform_aggregate"], case)
    args = call.arguments(dtype)
    grad = torch.randn(call.operator(*args).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = both(call, args, grad)
    for b in (0, 8):
        own = [v[b : b + 1] if i in call.operator.batched and v is not None else v for i, v in enumerate(args)]
        for name, one, all_of_them in zip(
            ("output", "value", "coordinates", "weights"), both(call, own, grad[b : b + 1]), together, strict=True
        ):
            assert_equal(one, all_of_them[b : b + 1], name)


@needs_kernel("deform_roi_pool")
@DTYPES
@pytest.mark.parametrize("size", [(12, 13), (300, 310)], ids=["dense", "sparse"])
@pytest.mark.parametrize("channels", [3, 16, 70])
def test_image_of_rois(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    case = Pool("roi", 3, channels, size, 21, (3, 2), sampling_ratio=0, bin_size=7.0)
    call = Call(operators["deform_roi_pool"], case)
    input, rois, offset, *rest = call.arguments(dtype)
    grad = torch.randn(21, channels, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    # One image is read as often as possible, another not at all.
    rois[:, 0] = rois[:, 0].clamp(min=1)
    rois = torch.cat([rois, rois.repeat(20, 1).index_fill(1, torch.tensor([0]), 2.0)])
    offset, grad = offset.repeat(21, 1, 1, 1), grad.repeat(21, 1, 1, 1)
    together = both(call, [input, rois, offset, *rest], grad)
    for b in (0, 1, 2):
        own = rois[:, 0] == b
        alone = both(
            call,
            [input[b : b + 1], rois[own].index_fill(1, torch.tensor([0]), 0.0), offset[own], *rest],
            grad[own],
        )
        for name, one, expected in zip(
            ("output", "input", "offset"),
            alone,
            (together[0][own], together[1][b : b + 1], together[2][own]),
            strict=True,
        ):
            assert_equal(one, expected, name)
