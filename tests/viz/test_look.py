"""``deformkit look`` writes a page and a picture, or one line if a file cannot be read."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("plotly")
Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner  # noqa: E402

from deformkit import look  # noqa: E402
from deformkit.cli import app  # noqa: E402


def drawn(path: Path, size: tuple[int, int] = (60, 40), mode: str = "RGB", colour: object = "white") -> Path:
    picture = Image.new(mode, size, colour)
    picture.paste("black" if mode == "RGB" else (0, 0, 0, 255), (20, 10, 30, 30))
    picture.save(path)
    return path


def test_look_writes_a_page_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = drawn(tmp_path / "ink.png")
    before = image.read_bytes()
    state = torch.get_rng_state()
    result = CliRunner().invoke(app, ["look", str(image), "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ink.png", "ink_look.html", "ink_look.png"]
    page = (tmp_path / "ink_look.html").read_text()
    # The network sees 21 x 32 pixels; its first layer halves them.
    assert "deform_conv, 11x16 positions" in page
    with Image.open(tmp_path / "ink_look.png") as picture:
        assert picture.size[0] > 300
    assert image.read_bytes() == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("none.png", "page.html", "there is no such file"),
        ("text.png", "page.html", "it cannot be read as a picture"),
        ("cut.png", "page.html", "it cannot be read as a picture"),
        ("ink.png", "page.txt", "it must be an .html file in a folder that exists"),
        ("ink.png", "nowhere/page.html", "it must be an .html file in a folder that exists"),
        ("ink.png", "ink.html", "would replace"),
    ],
)
def test_bad_files_give_one_line(
    name: str, out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(Path("ink.png"))
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(Path("ink.png").read_bytes()[:60])
    monkeypatch.setattr(look, "_trained", lambda *args: pytest.fail("trained before the arguments were checked"))
    result = CliRunner().invoke(app, ["look", name, "--out", out])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (line,) = result.output.splitlines()
    assert line.startswith("deformkit: ") and message in line


def test_ink_on_paper_is_inverted_and_transparent_is_white(tmp_path: Path) -> None:
    ink = look.as_digit(look.load(drawn(tmp_path / "ink.png")), 32)
    assert ink.shape == (1, 21, 32) and ink[0, 0, 0] < 0.01 and ink[0, 10, 13] > 0.99
    clear = look.load(drawn(tmp_path / "clear.png", mode="RGBA", colour=(0, 0, 0, 0)))
    torch.testing.assert_close(look.as_digit(clear, 32), ink)
    assert torch.equal(look.as_digit(1 - clear, 32), look.as_digit(clear, 32)), "bright on dark stays as it is"


def test_a_long_picture_keeps_its_shape_and_at_least_one_pixel(tmp_path: Path) -> None:
    shown = look.load(drawn(tmp_path / "long.png", size=(1300, 10)))
    assert shown.shape == (3, 5, 640) and look.as_digit(shown, 32).shape == (1, 1, 32)
