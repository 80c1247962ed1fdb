"""The page in a real browser. Skipped where there is no Chromium, no chromedriver or no Selenium."""

from __future__ import annotations

import os
import shutil
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from stepquant.report import write
from stepquant.report.comparison import Comparison, Contender, render_comparison

webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium or its chromedriver is not installed")

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Whatever proxy the machine has, the driver is on this one.
    os.environ["NO_PROXY"] = os.environ.get("NO_PROXY", "") + ",localhost,127.0.0.1"
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Browser:
    """An open page with short methods for the tests."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def show(self, report, width: int = 1000, media: str = "screen", scheme: str = "light"):
        write(report, self.folder / "report.html")
        emulated = {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get((self.folder / "report.html").as_uri())

    def show_page(self, text: str, width: int = 1000):
        (self.folder / "page.html").write_text(text, encoding="utf-8")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get((self.folder / "page.html").as_uri())

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str):
        return self.driver.execute_script(f"return {script}")

    def focus(self, selector: str):
        element = self.one(selector)
        self.driver.execute_script("arguments[0].focus()", element)
        return element

    def style(self, selector: str, name: str) -> str:
        return self.run(f"getComputedStyle(document.querySelector({selector!r})).getPropertyValue({name!r})")

    def pixel(self, selector: str) -> tuple[int, ...]:
        """The color a quarter into an element, away from the divider."""
        box = self.run(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        with Image.open(BytesIO(b64decode(self.driver.get_screenshot_as_base64()))) as image:
            place = (int(box["x"] + box["width"] / 4), int(box["y"] + box["height"] / 4))
            return image.convert("RGB").getpixel(place)

    def column(self, table: str, index: int) -> list[str]:
        return [cell.text for cell in self.all(f"{table} tbody tr > :nth-child({index})")]


@pytest.fixture
def browser(chromium, tmp_path):
    chromium.get_log("browser")  # reading empties it
    yield Browser(chromium, tmp_path)
    assert chromium.get_log("browser") == []


def test_it_renders_without_a_complaint_and_loads_nothing(browser, report):
    browser.show(report)
    assert browser.run("document.title") == "a model - stepquant report"
    assert browser.run("[...document.images].every(i => i.naturalWidth > 0)")
    assert len(browser.all(".pair img")) == 6
    loaded = browser.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_the_slider_moves_with_the_keys(browser, report):
    browser.show(report)
    assert browser.style(".quantized", "clip-path") == "inset(0px 0px 0px 50%)"
    assert browser.pixel(".pair") == (128, 128, 128)
    browser.focus("#cut").send_keys(Keys.ARROW_RIGHT)
    assert browser.style(".quantized", "clip-path") == "inset(0px 0px 0px 51%)"
    browser.focus("#cut").send_keys(Keys.HOME)
    assert browser.style(".quantized", "clip-path") == "inset(0px 0px 0px 0%)"
    # 0.125 of the range -1 to 1 is 16 codes: the brighter, quantized image is in front everywhere now.
    assert browser.pixel(".pair") == (143, 143, 143)


def test_the_difference_is_what_lies_between_the_images(browser, report):
    browser.show(report)
    browser.focus("[data-class=split-on]").send_keys(Keys.ARROW_RIGHT)
    assert browser.pixel(".pair") == pytest.approx([8 * 15] * 3, abs=1)
    browser.focus("#gain").send_keys(Keys.HOME)
    assert browser.pixel(".pair") == pytest.approx([15] * 3, abs=1)
    assert not browser.one("#cut").is_displayed()
    browser.show(replace(report, quantized=report.full_precision))
    browser.focus("[data-class=split-on]").send_keys(Keys.ARROW_RIGHT)
    assert browser.pixel(".pair") == (0, 0, 0)


def test_tables_sort_by_their_numbers(browser, report):
    browser.show(report)
    heads = {head.text.split()[0]: head for head in browser.all("table.layers thead th")}

    def press(name: str) -> str | None:
        browser.driver.execute_script("arguments[0].firstElementChild.focus()", heads[name])
        browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
        return heads[name].get_attribute("aria-sort")

    assert press("size") == "ascending"
    assert browser.column("table.layers", 1) == ["third", "fourth", "first", "second"]
    assert press("size") == "descending"
    assert browser.column("table.layers", 1) == ["second", "first", "fourth", "third"]
    # Without a range: last, whichever way.
    assert press("range") == "ascending"
    assert browser.column("table.layers", 5) == ["7.5", "10.2", "", ""]
    assert press("range") == "descending"
    assert browser.column("table.layers", 5) == ["10.2", "7.5", "", ""]
    assert heads["size"].get_attribute("aria-sort") is None
    assert press("layer") == "ascending"
    assert browser.column("table.layers", 1) == ["first", "fourth", "second", "third"]


def test_one_curve_is_shown_and_can_be_chosen(browser, report):
    browser.show(report)

    def shown() -> list[str]:
        return [figure.get_attribute("data-curve") for figure in browser.all(".curves figure") if figure.is_displayed()]

    assert shown() == ["first"], "it changes by a factor of four, the second by two"
    browser.focus("#curve").send_keys(Keys.ARROW_DOWN)
    assert shown() == ["second [0:8]"]
    browser.one("#map tr[data-curve=first] .cells").click()
    assert shown() == ["first"]
    assert browser.one("#curve").get_attribute("value") == "first"


def test_the_map_can_show_changes(browser, report):
    browser.show(report)
    cells, legends = "#map tr:first-child img", "#map svg[class*=map-]"
    assert [[one.is_displayed() for one in browser.all(which)] for which in (cells, legends)] == [[True, False]] * 2
    browser.focus("[data-class=ranges-on]").send_keys(Keys.ARROW_RIGHT)
    assert [[one.is_displayed() for one in browser.all(which)] for which in (cells, legends)] == [[False, True]] * 2
    assert browser.one("img.map-errors").is_displayed(), "the map of sensitivities is another one"


@pytest.mark.parametrize("width", [320, 375, 768, 1400])
def test_no_screen_is_too_narrow(browser, report, width):
    long = replace(report.layers[0], name="down_blocks.0." * 8)
    wide = replace(report.activations[0], name="down_blocks.0." * 8)
    browser.show(replace(report, layers=[long], activations=[wide], sensitivity=None), width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_dark_where_dark_is_preferred(browser, report):
    brightness = {}
    for scheme in ("light", "dark"):
        browser.show(report, scheme=scheme)
        colors = [browser.style("body", name) for name in ("background-color", "color")]
        brightness[scheme] = [sum(map(int, color.strip("rgb()").split(","))) for color in colors]
    assert brightness["light"][0] > 700 > 100 > brightness["light"][1]
    assert brightness["dark"][0] < 100 < 600 < brightness["dark"][1]


def test_on_paper_images_stand_side_by_side(browser, report):
    browser.show(report, media="print", scheme="dark")
    assert browser.style("body", "background-color") == "rgb(255, 255, 255)"
    assert not browser.one("#cut").is_displayed()
    assert browser.style(".quantized", "clip-path") == "none"
    left, right = (image.rect for image in browser.all(".pair img")[:2])
    assert right["x"] >= left["x"] + left["width"]
    assert right["y"] == left["y"]


def test_nothing_of_a_checkpoint_runs(browser, hostile_report):
    browser.show(hostile_report)
    assert browser.run("window.hacked") is None
    assert "window.hacked=1" in browser.one("h1").text
    assert browser.one("#curve").get_attribute("value") == hostile_report.name
    assert len([figure for figure in browser.all(".curves figure") if figure.is_displayed()]) == 1


@pytest.mark.parametrize("width", [320, 1000])
def test_a_comparison_sorts_and_fits(browser, report, width):
    models = [
        Contender(name, "minmax", "w8a8", report.figures.model_copy(update={"denoiser_bytes": size}), report.quantized)
        for name, size in (("large", 3_000_000), ("small", 900_000))
    ]
    browser.show_page(render_comparison(Comparison("zoo:model", models, report.full_precision)), width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.one(".strips th").rect["width"] >= 80, "a name is not broken into letters"
    size = next(head for head in browser.all("table.models thead th") if head.text.startswith("size"))
    browser.driver.execute_script("arguments[0].firstElementChild.click()", size)
    assert browser.column("table.models", 1) == ["small", "large", "zoo:model"]
    assert browser.run("[...document.images].every(i => i.naturalWidth > 0)")
