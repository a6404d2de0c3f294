"""The blocks of code on the page about viz run, in order."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

PAGE = Path(__file__).parents[2] / "docs" / "viz.md"


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"position.png", "where.html"}
    # The output according to the page.
    assert [
        line[2:] for line in blocks[0].splitlines() if re.match(r"# \d", line)
    ] == capsys.readouterr().out.splitlines()


def test_pictures_exist() -> None:
    shown = set(re.findall(r"\]\((viz/[^)]+)\)", PAGE.read_text()))
    assert shown and all((PAGE.parent / name).is_file() for name in shown)
