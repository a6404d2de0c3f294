"""Every file in examples/ runs."""

import inspect
import runpy
from pathlib import Path

import pytest

NEEDS = {"detection_2d": ("sklearn", "matplotlib", "rich")}
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_examples_exist() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(path))["main"]
    assert "steps" in inspect.signature(main).parameters, "an example takes the number of its steps"
    main(steps=2)
    printed = capsys.readouterr().out
    assert printed and "nan" not in printed
