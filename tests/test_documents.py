"""Every block of Python in the README and in the documentation runs, page by page and in order."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import deformkit as dk
from deformkit import compat

ROOT = Path(__file__).parents[1]
BLOCKS = Sybil([PythonCodeBlockParser(), SkipParser()])
# A line that prints, and its output in comments below it.
PRINTED = re.compile(r"^print\(.*\)\n((?:# .*(?:\n|$))+)", re.MULTILINE)
# On this page other packages warn of their own code.
WARNING = ROOT / "docs/deploy/decomposed.md"
IGNORED = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/*.md"))]


def parsed(page: Path) -> Document:
    document = BLOCKS.parse(page)
    # Used in the conditions of pages: <!-- skip: next if(missing("monai"), reason="needs MONAI") -->
    document.namespace["missing"] = lambda package: find_spec(package) is None
    return document


def examples() -> Iterator[object]:
    for page in PAGES:
        blocks = list(parsed(page).examples())
        for number, example in enumerate(blocks):
            marks = IGNORED if page == WARNING else ()
            yield pytest.param(page, blocks, number, id=f"{page.relative_to(ROOT)}:{example.line}", marks=marks)


@pytest.fixture(scope="module", autouse=True)
def _current(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, int]]:
    """The current page, and how many of its blocks have run: the shims that it installs stay until the next page.

    The pages run in a temporary folder, which receives the files that they write.
    """
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("documents"))
    # A page may continue an example.
    sys.path.append(str(ROOT / "examples"))
    yield (current := {})
    sys.path.remove(str(ROOT / "examples"))
    os.chdir(before)
    current.clear()
    compat.uninstall()


@pytest.mark.parametrize(("page", "blocks", "number"), list(examples()))
def test_block_runs(
    page: Path, blocks: list[Example], number: int, _current: dict[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    if page not in _current:
        compat.uninstall()
        _current.clear()
    # Those before it may have been the tests of another process.
    for earlier in blocks[_current.get(page, 0) : number]:
        with suppress(SkipTest):
            earlier.evaluate()
    _current[page] = number + 1
    capsys.readouterr()
    blocks[number].evaluate()
    printed = capsys.readouterr().out.split()
    for lines in PRINTED.findall(str(blocks[number].parsed)):
        expected = [word for line in lines.splitlines() for word in line.removeprefix("#").split()]
        assert " ".join(expected) in " ".join(printed)


def test_pictures_exist() -> None:
    """All but those that the build draws."""
    shown = [page.parent / name for page in PAGES for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())]
    shown = [picture for picture in shown if "_generated" not in picture.parts]
    assert len(shown) > 5
    assert [picture for picture in shown if not picture.is_file()] == []


def test_pages_with_blocks_are_found() -> None:
    """If the parser found nothing, every page would pass."""
    found = {page for page in PAGES if any(parsed(page).examples())}
    assert found == {page for page in PAGES if "\n```python\n" in page.read_text()}


def test_every_page_for_newcomers_is_in_its_index() -> None:
    folder = ROOT / "docs/coming_from"
    found = set(re.findall(r"\((\w+)\.md\)", (folder / "index.md").read_text()))
    assert found == {page.stem for page in folder.glob("*.md")} - {"index"}


def convolve(channels: int = 18, size: tuple[int, int] = (20, 30), dtype: torch.dtype = torch.float32) -> object:
    offset = torch.zeros(1, channels, *size, dtype=dtype)
    return dk.deform_conv2d(torch.zeros(1, 8, 20, 30), offset, torch.zeros(16, 8, 3, 3))


def attend(positions: int = 4, dtype: torch.dtype = torch.float32) -> object:
    value, weights = torch.zeros(1, positions, 1, 4), torch.zeros(1, 1, 1, 1, 1)
    return dk.ms_deform_attn(value, [(2, 2)], torch.zeros(1, 1, 1, 1, 1, 2, dtype=dtype), weights)


MISTAKES: dict[str, Callable[[], object]] = {
    "MultiScaleDeformableAttention": lambda: __import__("MultiScaleDeformableAttention"),
    "channels; a 3x3 kernel": lambda: convolve(27),
    "spatial size": convolve,
    "torch.float64": lambda: convolve(size=(18, 28), dtype=torch.float64),
    "deform_groups": lambda: dk.nn.DeformConv2d(8, 8, 3, deform_groups=1),  # type: ignore[call-arg]
    "DeformConv2d'": lambda: dk.DeformConv2d,
    "spatial_shapes": lambda: attend(5),
    "torch.float16": lambda: attend(dtype=torch.float16),
    "without any deformable part": lambda: dk.patch(torch.nn.Linear(2, 2)),
}


@pytest.mark.parametrize("about", MISTAKES)
def test_the_faq_has_the_literal_text_of_an_error(about: str) -> None:
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    (heading,) = [heading for heading in headings if about in heading]
    with pytest.raises((ValueError, TypeError, AttributeError, ImportError)) as caught:
        MISTAKES[about]()
    assert re.search(".*".join(map(re.escape, heading.split("..."))), str(caught.value))
