"""The documentation builds without warnings; links, anchors and pictures exist; pages fit two widths of a screen."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (
    "sphinx",
    "furo",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery",
    "sphinx-mathjax-offline",
    "matplotlib",
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Pictures with lazy loading are not loaded at the top of a page; another test verifies that their files exist.
UNLOADED = """
return [...document.images]
  .filter(image => image.loading != "lazy" && !(image.complete && image.naturalWidth))
  .map(image => image.src)
"""
# The theme cuts off what is wider than the page, so the page does not scroll. Only elements inside one that scrolls
# may be wider, and those for screen readers. Headings have a background that reaches into the margin of 16 pixels.
CUT_OFF = """
const article = document.querySelector("article"), edge = article.getBoundingClientRect().right + 16
const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX)
const outside = element => {
  const box = element.getBoundingClientRect()
  if (!box.width || !box.height || box.right <= edge || element.closest("mjx-assistive-mml")) return false
  for (let parent = element.parentElement; parent != article; parent = parent.parentElement)
    if (scrolls(parent)) return false
  return true
}
return [...article.querySelectorAll("*")].filter(outside).map(element => element.outerHTML.slice(0, 80))
"""


class Links(HTMLParser):
    """The anchors of a page, and what it links to or loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(name for name in (found.get("id"), found.get("name")) if name)
        self.targets.extend(target for target in (found.get("href"), found.get("src")) if target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'deformkit[docs]'")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(output)]
    environment = {**os.environ, "GALLERY": ""}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return output


def pages(site: Path) -> list[Path]:
    return sorted(page for page in site.rglob("*.html") if "_static" not in page.relative_to(site).parts)


def broken(site: Path) -> list[str]:
    """Every internal link, anchor or picture that leads nowhere."""
    found = {page: Links(page) for page in pages(site)}
    faults = []
    for page, links in found.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchors = found[file].anchors if file in found else None
            if not file.is_file() or (url.fragment and anchors is not None and unquote(url.fragment) not in anchors):
                faults.append(f"{page.relative_to(site)}: {target}")
    return faults


def test_links_anchors_and_pictures_exist(site: Path) -> None:
    assert len(pages(site)) > 20
    assert broken(site) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<p id="here">')
    (tmp_path / "page.html").write_text(
        '<a href="other.html#here"></a> <a href="https://example.org/none"></a>'
        '<a href="other.html#gone"></a> <a href="none.html"></a> <img src="none.png">'
    )
    assert broken(tmp_path) == ["page.html: other.html#gone", "page.html: none.html", "page.html: none.png"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None or find_spec("selenium") is None:
        pytest.skip("needs chromium, chromedriver and selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def seen_faults(browser: Any, page: Path, width: int) -> dict[str, Any]:
    """The faults that the browser finds on a page at a width, by kind."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    faults = {
        "errors": [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"],
        "scrolls to": browser.execute_script("window.scrollTo(9999, 0); return window.scrollX"),
        "cut off": browser.execute_script(CUT_OFF),
        "not loaded": browser.execute_script(UNLOADED),
    }
    return {kind: found for kind, found in faults.items() if found}


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_a_screen_without_errors(site: Path, browser: Any, width: int) -> None:
    faults = {str(page.relative_to(site)): seen_faults(browser, page, width) for page in pages(site)}
    assert {page: found for page, found in faults.items() if found} == {}


def test_faults_of_pages_are_seen(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><body style="overflow-x: hidden"><article>'
        '<p style="width: 2000px">wide</p><div style="overflow-x: auto"><p style="width: 2000px">scrolls</p></div>'
        '<img src="none.png"><script>console.error("an error")</script></article>'
    )
    faults = seen_faults(browser, page, 390)
    assert any("an error" in message for message in faults["errors"])
    assert faults["cut off"] == ['<p style="width: 2000px">wide</p>']
    assert [Path(source).name for source in faults["not loaded"]] == ["none.png"]

    page.write_text('<!doctype html><article></article><p style="width: 2000px">wide</p>')
    assert seen_faults(browser, page, 390) == {"scrolls to": pytest.approx(2000 - 390, abs=30)}
