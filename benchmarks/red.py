"""The rate at which a GPU adds numbers to shared memory locations, which limits every gradient of a field.

``python benchmarks/red.py`` prints a table. The kernel adds one, two or four float32 numbers at once, or one int64, to
places anywhere in a buffer or to a few contended ones.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from gpu_clock import Clock

CHANNELS = 32
FOOTPRINTS = {"1 MiB": 2**20, "16 MiB": 2**24, "128 MiB": 2**27, "1 GiB": 2**30}
HOT = {"64 hot rows": 64, "1 hot row": 1}


@triton.jit
def add_rows(sums, places, values, rows, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHANNELS)
    exists = (row < rows)[:, None]
    # The compiler only knows that a row starts at a multiple of WIDTH, which determines the width of its additions.
    first = tl.load(places + row, mask=row < rows, other=0).to(tl.int64) * WIDTH
    amount = tl.load(values + row[:, None] * CHANNELS + column[None, :], mask=exists, other=0)
    tl.atomic_add(sums + first[:, None] + column[None, :], amount, mask=exists, sem="relaxed")


def rates(clock: Clock, device: str, rows: int, seconds: float) -> Iterator[dict[str, Any]]:
    """The numbers per second for each width, dtype and pattern; a launch adds ``rows`` rows of 32."""
    generator = torch.Generator(device).manual_seed(0)
    patterns = [
        *((name, "spread", size) for name, size in FOOTPRINTS.items()),
        *((n, "hot", c) for n, c in HOT.items()),
    ]
    for dtype, widths in ((torch.float32, (1, 2, 4)), (torch.int64, (1,))):
        # Integers, too, because the values have no effect on the places.
        values = torch.ones(rows, CHANNELS, dtype=dtype, device=device)
        for name, kind, size in patterns:
            targets = size // (CHANNELS * values.itemsize) if kind == "spread" else size
            sums = torch.zeros(targets, CHANNELS, dtype=dtype, device=device)
            target = torch.randint(targets, (rows,), device=device, generator=generator)
            for width in widths:
                places = (target * (CHANNELS // width)).to(torch.int32)

                def run(sums: Any = sums, places: Any = places, values: Any = values, width: int = width) -> None:
                    add_rows[(triton.cdiv(rows, 64),)](
                        sums, places, values, rows, WIDTH=width, CHANNELS=CHANNELS, ROWS=64, num_warps=4
                    )

                sums.zero_()
                run()
                right = bool(sums.sum(dtype=torch.float64) == rows * CHANNELS)
                timing = clock.device(run, seconds)
                about = {"dtype": str(dtype).removeprefix("torch."), "width": width, "where": name}
                rate = {"numbers_per_second": rows * CHANNELS / timing["median"]} if timing else {}
                yield {**about, "right": right, **rate, **timing}


def table(rows: list[dict[str, Any]]) -> str:
    where = list(dict.fromkeys(row["where"] for row in rows))
    lines = ["| added at once | " + " | ".join(where) + " |", "| --- |" + " --- |" * len(where)]
    for dtype, width in dict.fromkeys((row["dtype"], row["width"]) for row in rows):
        cells = [_cell(row) for row in rows if (row["dtype"], row["width"]) == (dtype, width)]
        lines.append(f"| {width} {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if not row["right"]:
        return "**wrong**"
    return f"{row['numbers_per_second'] / 1e12:.3g}" if "numbers_per_second" in row else "right"
