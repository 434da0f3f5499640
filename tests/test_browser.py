"""Pages in a real browser: nothing is missing, nothing sticks out, nothing is asked of a network, and they print."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cnnmpi.report import one_run, several_runs
from tests.test_report import made_up

pytestmark = pytest.mark.mpi_skip
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
WIDTHS = (400, 1400)
CLASSES = (1, 10, 200)
LARGEST = 3 << 20  # bytes of a report

# what is wrong on the page, as a person would see it
LOOK = """
const wrong = [], wide = document.documentElement.clientWidth, all = document.documentElement.scrollWidth;
for (const image of document.images)
  if (!image.complete || !image.naturalWidth || !image.clientWidth) wrong.push('no picture: ' + image.alt);
for (const curve of document.querySelectorAll('[id*="curve_"] > path, [id*="curve_"] use')) {
  const box = curve.getBoundingClientRect();
  if (!(box.width + box.height)) wrong.push('no curve');
}
if (all > wide) wrong.push('wider than the window: ' + all);
for (const each of document.querySelectorAll('h1, h2, h3, p, figure, figcaption, .tiles div')) {
  const box = each.getBoundingClientRect();
  if (box.right > wide + 1 || box.left < -1) wrong.push('sticks out: ' + each.textContent.slice(0, 40));
}
for (const each of document.querySelectorAll('[src], [href]')) {
  const where = each.getAttribute('src') || each.getAttribute('href');
  if (!/^(data:|#)/.test(where)) wrong.push('asks for ' + where);
}
return wrong;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def look(browser, path: Path, width: int, scheme: str = "light") -> None:
    """Open a page in a window of this width and fail for whatever is wrong with it."""
    screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.clientWidth") == width
    assert browser.execute_script(LOOK) == []
    assert browser.get_log("browser") == []


def color_of(browser, name: str) -> float:
    """The brightness, 0..255, of a colour of the page's body."""
    text = browser.execute_script(f"return getComputedStyle(document.body).{name}")
    return float(np.mean([int(word) for word in text[text.index("(") + 1 : text.index(")")].split(",")[:3]]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {f"{number} classes": made_up(number, folder, name=f"run {number}") for number in CLASSES}
    texts = {name: one_run(known) for name, known in runs.items()} | {"compared": several_runs([*runs.values()])}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*(f"{number} classes" for number in CLASSES), "compared"])
def test_a_report_is_whole_at_any_width(browser, pages, name, width):
    look(browser, pages[name], width)
    assert pages[name].stat().st_size < LARGEST
    expected = {"compared": 0, "1 classes": 1, "10 classes": 37, "200 classes": 38}[
        name
    ]  # the matrix of many, the filters
    assert browser.execute_script("return document.images.length") == expected
    curves = browser.execute_script("""return document.querySelectorAll('[id*="curve_"]').length""")
    assert curves >= (18 if name == "compared" else 9)


def test_a_report_is_light_or_dark_as_the_reader_wants_and_prints_dark_on_light(browser, pages):
    look(browser, pages["10 classes"], 1400, "light")
    assert color_of(browser, "backgroundColor") > 250 and color_of(browser, "color") < 60
    look(browser, pages["10 classes"], 1400, "dark")
    assert color_of(browser, "backgroundColor") < 40 and color_of(browser, "color") > 200
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert color_of(browser, "backgroundColor") > 250 and color_of(browser, "color") < 60
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 2


def test_the_browser_notices_what_is_missing(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><h1 style='width: 2000px'>wide</h1><img src='data:image/png;base64,AAAA' alt='x'>"
        "<img src='gone.png' alt='y'><script>nowhere()</script>"
    )
    screen = {"width": 400, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    wrong = "; ".join(browser.execute_script(LOOK))
    assert all(word in wrong for word in ("no picture: x", "no picture: y", "sticks out", "asks for", "wider than"))
    assert len(browser.get_log("browser")) >= 2
