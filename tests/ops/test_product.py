"""The products of cpu/gemm.h are compared with torch.mm."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native_library import compiled
from torch import Tensor

from deformkit._testing import assert_close

OPTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}
LEVELS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}
RUNNABLE = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])
SIZES = [(1, 1, 1), (13, 33, 7), (14, 16, 5), (29, 64, 40), (96, 31, 1), (97, 100, 130), (5, 17, 2)]


@pytest.fixture(scope="module", params=RUNNABLE)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield ctypes.CDLL(str(compiled("product", tmp_path_factory.mktemp(request.param), *OPTIONS[request.param])))


def packed(right: Tensor, tile: int) -> Tensor:
    depth, columns = right.shape
    panels = torch.nn.functional.pad(right, (0, -columns % tile)).reshape(depth, -1, tile)
    return panels.transpose(0, 1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "matrix"])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("add", [False, True], ids=["stores", "adds"])
def test_product(
    library: Any, dtype: torch.dtype, size: tuple[int, int, int], is_packed: bool, turned: bool, add: bool
) -> None:
    rows, columns, depth = size
    generator = torch.Generator().manual_seed(rows)
    left, right, before = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, depth), (depth, columns), (rows, columns))
    )
    tile = library.columns_of_a_tile(dtype == torch.float64)
    pitch = columns + -columns % tile + 3
    result = torch.full((rows, pitch), torch.nan, dtype=dtype)
    result[:, :columns] = before
    stored = left.t().contiguous() if turned else left
    steps = (1, rows) if turned else (depth, 1)
    operand = packed(right, tile) if is_packed else torch.nn.functional.pad(right, (0, pitch - columns))
    call = library.product_double if dtype == torch.float64 else library.product_float
    numbers = [ctypes.c_int64(n) for n in (rows, columns, depth)]
    call(
        *numbers,
        ctypes.c_void_p(stored.data_ptr()),
        *(ctypes.c_int64(n) for n in steps),
        ctypes.c_void_p(operand.data_ptr()),
        ctypes.c_bool(is_packed),
        ctypes.c_int64(pitch),
        ctypes.c_void_p(result.data_ptr()),
        ctypes.c_int64(pitch),
        ctypes.c_bool(add),
    )
    start = before if add else torch.zeros_like(before)
    truth = start.double() + left.double() @ right.double()
    assert_close(result[:, :columns], truth, start + left @ right)
    # Nothing is written beyond the whole vectors of the last columns.
    assert result[:, pitch - 3 :].isnan().all()
