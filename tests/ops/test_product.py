"""The products of cpu/gemm.h and cpu/amx.h are compared with torch.mm."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native_library import compiled
from torch import Tensor

from deformkit._testing import assert_close, assert_equal

OPTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}
LEVELS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}
RUNNABLE = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])
SIZES = [(1, 1, 1), (13, 33, 7), (14, 16, 5), (29, 64, 40), (96, 31, 1), (97, 100, 130), (5, 17, 2)]
# Around the sixteen rows, columns and pairs of a matrix register, of which two are filled at a time.
SIZES_OF_PAIRS = [*SIZES, (16, 32, 16), (32, 48, 32), (33, 17, 50), (48, 32, 15)]


@pytest.fixture(scope="module", params=RUNNABLE)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield ctypes.CDLL(str(compiled("product", tmp_path_factory.mktemp(request.param), *OPTIONS[request.param])))


def packed(right: Tensor, tile: int) -> Tensor:
    depth, columns = right.shape
    panels = torch.nn.functional.pad(right, (0, -columns % tile)).reshape(depth, -1, tile)
    return panels.transpose(0, 1).contiguous()


def multiplied(
    library: Any, function: str, left: Tensor, right: Tensor, before: Tensor, is_packed: bool, turned: bool, add: bool
) -> Tensor:
    """The result of a product of the library, into which ``before`` was written, without what lies beyond it."""
    rows, depth = left.shape
    columns = right.shape[1]
    tile = library.columns_of_a_tile(before.dtype == torch.float64)
    pitch = columns + -columns % tile + 3
    result = torch.full((rows, pitch), torch.nan, dtype=before.dtype)
    result[:, :columns] = before
    stored = left.t().contiguous() if turned else left
    operand = packed(right, tile) if is_packed else torch.nn.functional.pad(right, (0, pitch - columns))
    getattr(library, function)(
        *(ctypes.c_int64(n) for n in (rows, columns, depth)),
        ctypes.c_void_p(stored.data_ptr()),
        *(ctypes.c_int64(n) for n in ((1, rows) if turned else (depth, 1))),
        ctypes.c_void_p(operand.data_ptr()),
        ctypes.c_bool(is_packed),
        ctypes.c_int64(pitch),
        ctypes.c_void_p(result.data_ptr()),
        ctypes.c_int64(pitch),
        ctypes.c_bool(add),
    )
    # Nothing is written beyond the whole vectors of the last columns.
    assert result[:, pitch - 3 :].isnan().all()
    return result[:, :columns]


def operands(dtype: torch.dtype, rows: int, columns: int, depth: int) -> list[Tensor]:
    """The left and the right operand, and what is in the result before."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, depth), (depth, columns), (rows, columns))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "matrix"])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("add", [False, True], ids=["stores", "adds"])
def test_product(
    library: Any, dtype: torch.dtype, size: tuple[int, int, int], is_packed: bool, turned: bool, add: bool
) -> None:
    left, right, before = operands(dtype, *size)
    function = "product_double" if dtype == torch.float64 else "product_float"
    result = multiplied(library, function, left, right, before, is_packed, turned, add)
    start = before if add else torch.zeros_like(before)
    assert_close(result, start.double() + left.double() @ right.double(), start + left @ right)


# Turned operands are multiplied in vectors, others in matrix registers where the processor has them.
@pytest.mark.parametrize("size", SIZES_OF_PAIRS, ids=str)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "matrix"])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("add", [False, True], ids=["stores", "adds"])
def test_pairs(library: Any, size: tuple[int, int, int], is_packed: bool, turned: bool, add: bool) -> None:
    skip_without_pairs(library)
    rows, columns, pairs = size
    left, right, before = operands(torch.bfloat16, rows, columns, 2 * pairs)
    in_pairs = right.unflatten(0, (-1, 2)).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    start = before.float()
    units = (left.view(torch.int32), in_pairs.view(torch.int32).squeeze(2))
    result = multiplied(library, "product_pairs", *units, start, is_packed, turned, add)
    start = start if add else torch.zeros_like(start)
    assert_close(result, start.double() + left.double() @ right.double(), start + left.float() @ right.float())


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (32, 16), (30, 17), (66, 40)])
def test_rows_are_paired_and_turned(library: Any, rows: int, columns: int) -> None:
    skip_without_pairs(library)
    pitch = columns + -columns % 16
    values = torch.arange(rows * pitch, dtype=torch.int16).reshape(rows, pitch)
    pairs_pitch = rows // 2 + -(rows // 2) % 16
    pairs = torch.zeros(columns, pairs_pitch, 2, dtype=torch.int16)
    library.pair_and_turn_rows(
        ctypes.c_void_p(values.data_ptr()),
        *(ctypes.c_int64(n) for n in (rows, columns, pitch)),
        ctypes.c_void_p(pairs.data_ptr()),
        ctypes.c_int64(pairs_pitch),
    )
    expected = values[:, :columns].t().reshape(columns, rows // 2, 2)
    assert_equal(pairs[:, : rows // 2], expected)


def skip_without_pairs(library: Any) -> None:
    if not ctypes.c_bool(library.has_pairs()).value:
        pytest.skip("no products of pairs of bfloat16 with this instruction set on this processor")
