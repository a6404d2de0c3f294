"""The calls that are timed on a GPU: sizes of networks in use, each with points near and points anywhere."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deformkit._testing.cases import operator, tiny
from deformkit.ops.deform_aggregate import cases as aggregate
from deformkit.ops.deform_conv import cases as conv
from deformkit.ops.deform_roi_pool import cases as roi
from deformkit.ops.deform_sample import cases as sample
from deformkit.ops.ms_deform_attn import cases as attn

_DETECTION = ((100, 167), (50, 84), (25, 42), (13, 21))
_MASK2FORMER = ((32, 32), (64, 64), (128, 128))

CASES: list[Any] = [
    conv.Case("R50 c3", 2, 128, (100, 167), 128, (3, 3), padding=1),
    attn.Case("DETR decoder", 4, _DETECTION, 300, 8, 32, (4, 4, 4, 4), reach=0.0),
    aggregate.Case("DCNv4 56x56", 64, (56, 56), 4, 32, (3, 3), padding=1),
    roi.Case("FPN P2", 1, 256, (200, 336), 1000, (7, 7), 1 / 4, bin_size=6.0),
    conv.Case("R50 c5", 2, 512, (25, 42), 512, (3, 3), padding=1),
    attn.Case("DETR encoder", 2, _DETECTION, 22223, 8, 32, (4, 4, 4, 4), near=2.0),
    conv.Case("CenterNet", 16, 64, (128, 128), 64, (3, 3), padding=1),
    conv.Case("R50 c4", 2, 256, (50, 84), 256, (3, 3), padding=1),
    aggregate.Case("DCNv4 14x14", 64, (14, 14), 16, 32, (3, 3), padding=1),
    conv.Case("B32 56x56", 32, 256, (56, 56), 256, (3, 3), padding=1),
    conv.Case("BiRefNet k3", 1, 64, (256, 256), 256, (3, 3), padding=1),
    attn.Case("Mask2Former", 2, _MASK2FORMER, 21504, 8, 32, (4, 4, 4), near=2.0),
    conv.Case("volume", 1, 64, (16, 64, 64), 64, (3, 3, 3), padding=1),
    conv.Case("BiRefNet k7", 1, 64, (256, 256), 256, (7, 7), padding=3),
    aggregate.Case("DCNv4 28x28", 64, (28, 28), 8, 32, (3, 3), padding=1),
    aggregate.Case("DCNv4 7x7", 64, (7, 7), 32, 32, (3, 3), padding=1),
    sample.Case("flow", 1, 64, (256, 256), (256, 256), spread=1.0),
    sample.Case("registration", 1, 1, (160, 192, 160), (160, 192, 160), spread=1.0),
    conv.Case("sequence", 8, 512, (2000,), 512, (3,), padding=1),
]
"""The most telling first: a run that is short of time leaves out the last."""

DTYPES = {
    "deform_conv": (torch.bfloat16, torch.float32, torch.float16),
    "deform_aggregate": (torch.float16, torch.float32),
    "ms_deform_attn": (torch.float32, torch.bfloat16),
    "deform_roi_pool": (torch.float32, torch.bfloat16),
    "deform_sample": (torch.float32, torch.bfloat16),
}
NEAR, ANYWHERE = "N(0, 2 px)", "uniform"


@dataclass(frozen=True)
class Workload:
    """A case with its points near their positions without offsets, or anywhere on the map."""

    case: Any
    points: str

    @property
    def operator(self) -> str:
        return operator(self.case)

    def arguments(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        named = self.case.arguments(dtype, device)
        if self.points == ANYWHERE and "offset" in named and self.operator != "deform_roi_pool":
            named["offset"] = self._anywhere(named["offset"])
        return named

    def _anywhere(self, offset: Tensor) -> Tensor:
        """Offsets to places that are uniform over the map, for every output position."""
        case, size = self.case, torch.tensor(self.case.size, device=offset.device)
        last = offset if self.operator == "deform_aggregate" else _coordinates_last(offset, case.axes)
        generator = torch.Generator(offset.device).manual_seed(1)
        targets = torch.rand(last.shape, device=offset.device, generator=generator) * size
        positions = torch.meshgrid(*(torch.arange(n, device=offset.device) for n in case.size), indexing="ij")
        own = torch.stack(positions, -1).reshape(1, *case.size, *[1] * (last.dim() - 2 - case.axes), case.axes)
        shift = (targets - own).to(offset.dtype)
        return shift if self.operator == "deform_aggregate" else shift.movedim(-2, 1).movedim(-1, 2).reshape_as(offset)


def _coordinates_last(offset: Tensor, axes: int) -> Tensor:
    """``[B, *out, taps, N]`` of an offset ``[B, taps * N, *out]``."""
    return offset.unflatten(1, (-1, axes)).movedim(2, -1).movedim(1, -2)


def workloads(small: bool = False) -> list[Workload]:
    """All calls, or the same calls at tiny sizes for the interpreter, to verify that everything runs."""
    cases = [tiny(name)[1] for name in DTYPES] if small else CASES
    return [
        Workload(_placed(case, points), points) for points in (NEAR, ANYWHERE) for case in cases if _has(case, points)
    ]


def _has(case: Any, points: str) -> bool:
    """Whether the points of a case can lie so: those of a decoder are anywhere, and RoIs have their own places."""
    kind = operator(case)
    if kind == "deform_roi_pool":
        return points == NEAR
    if kind == "ms_deform_attn":
        return points == ANYWHERE or case.near is not None
    if kind == "deform_sample":
        return points == ANYWHERE or case.spread is not None
    return points == NEAR or (_steps(case.stride) == {1} and len(_steps(case.padding)) == 1 and _keeps_size(case))


def _steps(values: int | tuple[int, ...]) -> set[int]:
    return {values} if isinstance(values, int) else set(values)


def _keeps_size(case: Any) -> bool:
    (padding,) = _steps(case.padding)
    return all(2 * padding == k - 1 for k in case.kernel_size) and _steps(case.dilation) == {1}


def _placed(case: Any, points: str) -> Any:
    if points == ANYWHERE and operator(case) == "deform_sample":
        return replace(case, spread=None)
    return replace(case, near=None, reach=0.0) if points == ANYWHERE and operator(case) == "ms_deform_attn" else case
