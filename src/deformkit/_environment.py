"""What can be said of an installation without importing torch."""

import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from . import __version__

_SPEAKING_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DEFORMKIT_SPREAD_SMALL_CALLS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def without_torch(error: BaseException) -> str:
    """The report of ``deformkit doctor`` where ``import torch`` raises ``error``."""
    libraries = sorted(path.name for path in Path(__file__).parent.glob("lib/*.so"))
    rows = [
        *packages(),
        ["torch", installed("torch") or "not installed"],
        *system(),
        ["kernels", ", ".join(libraries) or f"none in {Path(__file__).parent / 'lib'}"],
        ["installed in", sys.prefix],
    ]
    sections = [
        f"### deformkit doctor: {torch_problem(error)}",
        paragraph(
            "deformkit needs torch >= 2.10 in the same environment. https://pytorch.org/get-started shows how to "
            "install it on this system; then run `deformkit doctor` again."
        ),
        table(["what", "found"], [*rows, *variables()]),
    ]
    return "\n\n".join(sections)


def torch_problem(error: BaseException) -> str:
    """What is wrong with torch, in one line."""
    return f"torch does not import: {next(iter(str(error).splitlines()), type(error).__name__)}"


def packages() -> Iterator[list[str]]:
    """Rows of deformkit and Python."""
    yield ["deformkit", __version__]
    yield ["Python", f"{platform.python_version()} ({platform.python_implementation()})"]


def system() -> Iterator[list[str]]:
    """Rows of Triton, the operating system and the processor."""
    yield ["triton", installed("triton") or installed("pytorch-triton") or "not installed"]
    yield ["system", f"{platform.system()} {platform.release()}, {platform.machine()}"]
    yield ["processor", processor()]


def variables() -> Iterator[list[str]]:
    """Rows of the environment variables that change what runs or how fast."""
    for name in _SPEAKING_VARIABLES:
        if name in os.environ:
            yield [name, os.environ[name]]


def processor() -> str:
    """The name of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def paragraph(text: str, indent: str = "") -> str:
    """``text`` in lines that fit a terminal of 80 columns, all but the first behind ``indent``."""
    return textwrap.fill(text, 79, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
