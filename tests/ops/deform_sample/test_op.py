"""The public function of deformable sampling: points of any rank, and what PyTorch does with functions."""

from typing import Any

import pytest
import torch
from torch import Tensor

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.ops.deform_sample.cases import Case


@pytest.fixture
def named(axes: int) -> dict[str, Any]:
    return Case("small", 3, 4, (7, 6, 5)[:axes], (4, 3, 2)[:axes], groups=2).arguments(torch.float64)


def test_names_and_places_of_arguments(named: dict[str, Any]) -> None:
    """What follows the points goes by name alone."""
    assert list(named) == ["input", "points", "boundary", "mode"]
    with pytest.raises(TypeError):
        dk.deform_sample(*named.values())


@pytest.mark.parametrize("out_size", [(), (24,), (4, 6), (2, 3, 1, 4), (0, 5), (1,)])
def test_points_of_any_rank(named: dict[str, Any], out_size: tuple[int, ...]) -> None:
    count = torch.Size(out_size).numel()
    lists = named["points"].flatten(2, -2).repeat(1, 1, 24, 1)[:, :, :count]
    points = lists.reshape(3, 2, *out_size, lists.shape[-1])
    for boundary in ("zeros", "border", "reflect"):
        for mode in ("linear", "nearest"):
            expected = dk.reference.deform_sample(named["input"], lists, boundary, mode).reshape(3, 4, *out_size)
            for function in (dk.deform_sample, torch.jit.script(dk.deform_sample)):
                found = function(named["input"], points, boundary=boundary, mode=mode)
                assert found.shape == expected.shape
                assert_close(found, expected)


@pytest.mark.parametrize("boundary", ["zeros", "border", "reflect"])
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_points_that_lie_axis_by_axis_change_no_bit(
    axes: int, channels: int, boundary: Any, dtype: torch.dtype
) -> None:
    """A displacement whose axes were moved is read where it is; of a larger tensor, too."""
    size = (40, 30, 9)[-axes:]
    input = torch.randn(2, 2 * channels, *size).to(dtype)
    points = torch.randn(2, 2, *size, axes, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    points = 2 * points + torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij"), -1)
    room = torch.full((3, 3, axes + 1, *size), torch.nan, dtype=points.dtype)
    moved = room[1:, :2, 1:].movedim(2, -1).copy_(points)
    found, expected = (
        evaluate(lambda x, p: dk.deform_sample(x, p, boundary=boundary), [input, where], [0, 1], dtype)
        for where in (moved, points)
    )
    for name, one, other in zip(("output", "input", "points"), found, expected, strict=True):
        assert_equal(one, other, name)


def test_a_group_of_channels_reads_its_own_points(named: dict[str, Any]) -> None:
    input, points = named["input"], named["points"]
    whole = dk.deform_sample(input, points)
    for group in range(2):
        part = dk.deform_sample(input[:, 2 * group :][:, :2], points[:, group : group + 1])
        assert torch.equal(whole[:, 2 * group :][:, :2], part)


def test_whole_positions_return_the_input(named: dict[str, Any], axes: int) -> None:
    input = named["input"]
    along = [torch.arange(n, dtype=torch.float64) for n in input.shape[2:]]
    grid = torch.stack(torch.meshgrid(*along, indexing="ij"), -1).expand(3, 1, *input.shape[2:], axes)
    for boundary in ("zeros", "border", "reflect"):
        for mode in ("linear", "nearest"):
            assert torch.equal(dk.deform_sample(input, grid, boundary=boundary, mode=mode), input)


def test_compiles_whole_for_any_number_of_points(named: dict[str, Any], axes: int) -> None:
    torch.compiler.reset()
    compiled = torch.compile(dk.deform_sample, fullgraph=True, dynamic=True, backend="aot_eager")
    for repeat in (1, 3):
        points = named["points"].flatten(2, -2).repeat(1, 1, repeat, 1).unflatten(2, (repeat, -1))
        assert_close(compiled(named["input"], points), dk.deform_sample(named["input"], points))


def test_a_sample_without_a_batch_axis(named: dict[str, Any]) -> None:
    def one(input: Tensor, points: Tensor) -> Tensor:
        return dk.deform_sample(input[None], points[None])[0]

    assert_close(torch.func.vmap(one)(named["input"], named["points"]), dk.deform_sample(**named))
