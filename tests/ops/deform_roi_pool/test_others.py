"""Deformable RoI pooling is compared with the published formula, sample by sample, and with grid_sample."""

from itertools import product
from math import ceil, floor, prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, evaluate
from deformkit.ops.deform_roi_pool.cases import CASES, Case

PLAIN = [case for case in CASES if not case.group_size]
every_case = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
seeds = pytest.mark.parametrize("seed", range(3))


def ours(named: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, the gradients of input and offset by name, and their cotangent."""
    leaves = {k: named[k].detach().requires_grad_() for k in ("input", "offset") if named[k] is not None}
    output = dk.deform_roi_pool(**{**named, **leaves})
    cotangent = torch.randn(output.shape, dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return output.detach(), {"cotangent": cotangent, **dict(zip(leaves, grads, strict=True))}


class Published:
    """The values and gradients of the published kernel, one sample after the other.

    Its derivative by the offset ignores whether a sample was clamped; the derivative of deformkit is 0 along an axis
    that was clamped. ``clamped [R, *output_size]`` is True there.
    """

    def __init__(self, named: dict[str, Any], cotangent: Tensor) -> None:
        input, rois, offset = named["input"], named["rois"].tolist(), named["offset"]
        self.size = list(input.shape[2:])
        bins = named["output_size"]
        axes = len(bins)
        self.output = torch.zeros(len(rois), input.shape[1], *bins, dtype=torch.float64)
        self.grads = {"input": torch.zeros_like(input), "offset": torch.zeros(len(rois), axes, *bins).double()}
        self.clamped = torch.zeros(len(rois), *bins, dtype=torch.bool)
        self.points: list[list[float]] = []
        for r, (image, *corners) in enumerate(rois):
            # x, the first coordinate, is the last axis.
            low, high = corners[:axes][::-1], corners[axes:][::-1]
            starts = [c * named["spatial_scale"] - 0.5 for c in low]
            sides = [c * named["spatial_scale"] - 0.5 - s for c, s in zip(high, starts, strict=True)]
            widths = [side / n for side, n in zip(sides, bins, strict=True)]
            grid = [named["sampling_ratio"] or ceil(w) for w in widths]
            count = max(prod(grid), 1)
            field, grad_field = input[int(image)], self.grads["input"][int(image)]
            for place in product(*map(range, bins)):
                moved = list(starts)
                if offset is not None:
                    for axis in range(axes):
                        moved[axis] += named["gamma"] * sides[axis] * offset[(r, axes - 1 - axis, *place)].item()
                share = cotangent[(r, slice(None), *place)] / count
                for i in product(*map(range, grid)):
                    point = [
                        m + p * w + (k + 0.5) * w / g
                        for m, p, w, k, g in zip(moved, place, widths, i, grid, strict=True)
                    ]
                    self.points.append(point)
                    if any(x < -1 or x > n for x, n in zip(point, self.size, strict=True)):
                        continue
                    self.clamped[(r, *place)] |= any(x < 0 or x > n - 1 for x, n in zip(point, self.size, strict=True))
                    for corner, shares in self.corners(point):
                        at = (slice(None), *corner)
                        self.output[(r, slice(None), *place)] += prod(shares) * field[at] / count
                        grad_field[at] += prod(shares) * share
                        for axis in range(axes):
                            others = prod(s for a, s in enumerate(shares) if a != axis)
                            sign = 1 if corner[axis] > point[axis] else -1
                            slope = sign * others * named["gamma"] * sides[axis]
                            self.grads["offset"][(r, axes - 1 - axis, *place)] += slope * (share * field[at]).sum()

    def corners(self, point: list[float]) -> Any:
        """The corners of the cell around a clamped point, each with its weight along every axis."""
        sides = []
        for x, n in zip(point, self.size, strict=True):
            x = min(max(x, 0.0), n - 1.0)
            low = floor(x)
            sides.append([(low, low + 1 - x), (low + 1, x - low)] if low + 1 < n else [(low, 1.0)])
        for chosen in product(*sides):
            yield [c for c, _ in chosen], [s for _, s in chosen]


@every_case
@seeds
def test_the_published_formula(case: Case, seed: int) -> None:
    named = case.arguments(torch.float64, seed=seed)
    output, grads = ours(named)
    truth = Published(named, grads["cotangent"])
    assert_close(output, truth.output)
    assert_close(grads["input"], truth.grads["input"], name="gradient of input")
    if case.with_offset:
        inner = ~truth.clamped.unsqueeze(1).expand_as(grads["offset"])
        assert_close(grads["offset"][inner], truth.grads["offset"][inner], name="gradient of offset")


@pytest.mark.parametrize("ratio", [0, 2])
def test_every_gradient_of_the_published_formula(axes: int, ratio: int) -> None:
    """RoIs in the middle of an input, where nothing is clamped."""
    case = Case("inner", 2, 3, (30, 24, 20)[:axes], 6, (3, 2, 2)[:axes], 0.5, ratio, bin_size=2.0, spread=-1.0)
    named = case.arguments(torch.float64)
    output, grads = ours(named)
    truth = Published(named, grads["cotangent"])
    assert not truth.clamped.any()
    assert_close(output, truth.output)
    for name in ("input", "offset"):
        assert_close(grads[name], truth.grads[name], name=f"gradient of {name}")


def by_grid_sample(named: dict[str, Any]) -> Tensor:
    """The call with a fixed ratio, computed by grid_sample, which clamps; samples farther outside are set to 0 here."""
    input, rois, offset, ratio = (named[name] for name in ("input", "rois", "offset", "sampling_ratio"))
    axes, count, size = input.dim() - 2, rois.shape[0], input.shape[2:]
    grid = []
    for axis, bins in enumerate(named["output_size"]):
        low, high = rois[:, axes - axis] * named["spatial_scale"], rois[:, 2 * axes - axis] * named["spatial_scale"]
        share = (torch.arange(bins * ratio).to(rois) + 0.5) / (bins * ratio)
        line = torch.lerp(low[:, None] - 0.5, high[:, None] - 0.5, share).unflatten(1, (bins, ratio))
        shape = [n for a in range(axes) for n in ((bins, ratio) if a == axis else (1, 1))]
        point = line.reshape(count, *shape)
        if offset is not None:
            side = (high - low).reshape(count, *[1] * axes)
            moved = named["gamma"] * side * offset[:, axes - 1 - axis].to(rois)
            point = point + moved.reshape(count, *[n for bins in named["output_size"] for n in (bins, 1)])
        grid.append(point)
    points = torch.stack(torch.broadcast_tensors(*grid), -1)
    inside = torch.stack([(points[..., a] >= -1) & (points[..., a] <= size[a]) for a in range(axes)]).all(0)
    scale = torch.tensor([2 / max(n - 1, 1) for n in size], dtype=rois.dtype)
    flat = (points * scale - 1).flip(-1).flatten(1, -2)
    if axes == 1:  # an image one row high
        flat = torch.cat([flat, torch.zeros_like(flat)], -1)
    fields = input[rois[:, 0].long()].to(rois)
    fields = fields.unsqueeze(2) if axes == 1 else fields
    flat = flat.reshape(count, *[1] * (fields.dim() - 3), -1, flat.shape[-1])
    values = F.grid_sample(fields, flat, padding_mode="border", align_corners=True).reshape(
        count, input.shape[1], *points.shape[1:-1]
    )
    values = torch.where(inside.unsqueeze(1), values, 0.0)
    return values.mean(list(range(3, 3 + 2 * axes, 2))).to(input.dtype)


@pytest.mark.parametrize("case", [c for c in PLAIN if c.sampling_ratio], ids=lambda c: c.name)
@seeds
def test_grid_sample(case: Case, seed: int, dtype: torch.dtype) -> None:
    """The value and every gradient, also for clamped samples."""
    named = case.arguments(dtype, seed=seed)
    names = [name for name in ("input", "offset") if named[name] is not None]

    def found(function: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        values = {k: v.to(dtype) if isinstance(v, Tensor) and dtype else v for k, v in named.items()}
        keyed = [values[name] for name in names]
        return evaluate(
            lambda *v: function({**values, **dict(zip(names, v, strict=True))}),
            keyed,
            list(range(len(names))),
            named["input"].dtype,
        )

    actual = found(lambda named: dk.deform_roi_pool(**named))
    truth, reference = found(by_grid_sample, torch.float64), found(by_grid_sample)
    for name, *results in zip(["output", *names], actual, truth, reference, strict=True):
        assert_close(*results, name=name)


@every_case
@seeds
def test_samples_of_the_cases_keep_clear_of_grid_lines(case: Case, seed: int) -> None:
    """Otherwise rounding would decide on a derivative or on the number of samples."""
    named = case.arguments(torch.float64, seed=seed)
    if not case.sampling_ratio:
        lengths = (named["rois"][:, 1 + case.axes :] - named["rois"][:, 1 : 1 + case.axes]).flip(1) * case.spatial_scale
        widths = lengths / torch.tensor(case.output_size)
        assert ((widths - widths.round()).abs() > 0.02).all()
    points = Published(named, torch.zeros(case.rois, case.channels, *case.output_size, dtype=torch.float64)).points
    assert len(points) >= case.rois
    assert all(abs(x - round(x)) > 0.02 for point in points for x in point)
