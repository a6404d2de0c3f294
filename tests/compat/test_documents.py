"""Every block of code in the pages for those who come from another library runs."""

import re
from pathlib import Path

import pytest

from deformkit import compat

PAGES = sorted((Path(__file__).parents[2] / "docs" / "coming_from").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path) -> None:
    try:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, page.name, "exec"), {})
    finally:
        compat.uninstall()


def test_every_page_is_in_the_index() -> None:
    index = next(page for page in PAGES if page.stem == "index").read_text()
    assert {page.stem for page in PAGES} - {"index"} == set(re.findall(r"\((\w+)\.md\)", index))
