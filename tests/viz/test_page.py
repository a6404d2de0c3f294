"""A browser drives the interactive page, which draws the samples of the layer."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deformkit as dk
from deformkit import viz

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

DRAWN = "const t = element('figure').data; return [t[1].x, t[1].y, t[0].x, t[0].y, t[0].customdata]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with chromedriver is installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += (
        f"disable-component-update disable-sync window-size=1280,900 user-data-dir={tmp_path_factory.mktemp('user')}"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield running
    running.quit()


def moved_over(browser: Any, point: int) -> None:
    """Move the mouse over a point of the first trace, and wait until its samples are drawn."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    place = """
        const figure = element('figure'), layout = figure._fullLayout, trace = figure.data[0];
        const box = figure.getBoundingClientRect();
        return [box.left + layout.xaxis._offset + layout.xaxis.c2p(trace.x[arguments[0]]),
                box.top + layout.yaxis._offset + layout.yaxis.c2p(trace.y[arguments[0]])]
    """

    def shows(driver: Any) -> bool:
        if driver.execute_script("return shown === element('figure').data[0].customdata[arguments[0]]", point):
            return True
        # The place is asked for each time: the figure may be laid out once more after the page has loaded. The figure
        # follows the mouse after a delay, so that what it shows is looked at before the mouse moves again.
        x, y = driver.execute_script(place, point)
        for step in (3, 0):
            actions = ActionChains(driver, duration=0)
            actions.w3c_actions.pointer_action.move_to_location(round(x) + step, round(y))
            actions.perform()
        return False

    WebDriverWait(browser, 60).until(shows)


def assert_drawn(browser: Any, layer: viz.Layer, point: int, group: int | None = None) -> None:
    x, y, _, _, kept = browser.execute_script(DRAWN)
    at = torch.unravel_index(torch.tensor(kept[point]), layer.out)
    expected = layer.positions[0][at]
    expected = (expected if group is None else expected[group : group + 1]).flatten(0, 1)
    torch.testing.assert_close(torch.tensor(x), expected[:, -1], rtol=0, atol=1e-4, check_dtype=False)
    if layer.axes > 1:
        torch.testing.assert_close(torch.tensor(y), expected[:, -2], rtol=0, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("size", [(40,), (12, 16), (4, 12, 16)], ids=["1d", "2d", "3d"])
def test_moving_over_a_position_draws_its_samples(browser: Any, tmp_path: Path, size: tuple[int, ...]) -> None:
    layer = getattr(dk.nn, f"PackedDeformConv{len(size)}d")(2, 4, 3, padding=1, modulated=True, offset_groups=2)
    nn.init.normal_(layer.offset_head.weight, std=0.4)
    found = viz.sampling(nn.Sequential(nn.Identity(), layer), torch.rand(1, 2, *size))
    page = found.html(tmp_path / "page.html")
    assert "http-equiv" not in page.read_text() and "<script src" not in page.read_text()
    browser.get(page.as_uri())
    count = len(browser.execute_script(DRAWN)[4])
    for point in (count // 3, count // 2 + 3):
        moved_over(browser, point)
        assert_drawn(browser, found[0], point)
    browser.execute_script("element('group').value = '1'; element('group').dispatchEvent(new Event('change'))")
    assert_drawn(browser, found[0], point, group=1)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_page_of_levels_and_of_many_positions(browser: Any, tmp_path: Path) -> None:
    sizes = [(6, 8), (3, 4)]
    layer = dk.nn.MSDeformAttn(16, n_levels=2, n_heads=2, n_points=2)
    features = torch.randn(1, 60, 16)
    found = viz.sampling(layer, features, torch.rand(1, 60, 2, 2), features, sizes)
    browser.get(found.html(tmp_path / "page.html", image=torch.rand(3, 48, 64), most=20).as_uri())
    assert len(browser.execute_script(DRAWN)[4]) == 20
    moved_over(browser, 7)
    x, y, *_ = browser.execute_script(DRAWN)
    # Every third query is shown; one pixel of the first level is eight pixels of the image.
    expected = found[0].on((48, 64))[0, 21].flatten(0, 1)
    torch.testing.assert_close(torch.tensor([y, x]).T, expected, rtol=0, atol=1e-4)


def test_a_page_is_no_wider_than_a_telephone(browser: Any, tmp_path: Path) -> None:
    found = viz.sampling(dk.nn.PackedDeformConv2d(1, 2, 3, padding=1), torch.rand(1, 1, 54, 80))
    # Windows of Chromium have a minimum width; the width of the page is set independently.
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(found.html(tmp_path / "page.html").as_uri())
        width, given = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert given == 390 and width <= 390


def test_samples_do_not_hide_the_positions_under_them(browser: Any, tmp_path: Path) -> None:
    layer = dk.nn.PackedDeformConv2d(1, 1, 3, padding=1)
    found = viz.sampling(layer, torch.rand(1, 1, 9, 9))
    browser.get(found.html(tmp_path / "page.html").as_uri())
    # Offsets are zero, so that the samples of a position lie on its neighbours.
    for point in (40, 41, 50):
        moved_over(browser, point)
        assert_drawn(browser, found[0], point)
