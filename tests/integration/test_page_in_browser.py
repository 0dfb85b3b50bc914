"""The report in a real browser: narrow and wide, light and dark. Needs Chromium and its driver, as Debian packages."""

import io
import json
import shutil

import pytest

from let_plugin.bench import page
from tests.support import synthetic_rows

pytestmark = pytest.mark.slow

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

WIDTHS, SCHEMES = (400, 1280), ("light", "dark")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install let-plugin[dev]")
    if _CHROMIUM is None or _DRIVER is None:
        pytest.skip("no chromium or chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a long suite, with names that are in the way."""
    folder = tmp_path_factory.mktemp("report")
    path = folder / "rows.jsonl"
    synthetic_rows.throughput(path, noise=0.004, name="a-device-whose-name-has-no-place-to-break-" * 3)
    synthetic_rows.profile(path)
    methods = {"standard": 1.0, "let@0.1": 1.05, "let@1": 2.0, "RKD": 1.0, "SALT": 1.2, "random teacher": 0.9}
    synthetic_rows.converge(path, methods=methods)
    return page.write([path], folder / "out")[0]


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def opened(request, browser, report):
    """The browser with the page in it, with its width and its scheme."""
    width, scheme = request.param
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser"), browser.get_log("performance")  # of what was open before
    browser.get(report.as_uri())
    return browser, width, scheme


def test_the_page_as_it_is_seen(opened, tmp_path):
    browser, width, scheme = opened
    assert browser.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file://", "data:")) for url in urls)

    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    # No element is wider than what it is in, but for what scrolls by itself.
    wide = """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(wide) == []

    image = screenshot(browser, tmp_path / f"{width}-{scheme}.png")
    assert image.shape[1] == width and image.shape[0] > 3000
    corner = float(image[5, 5, :3].mean())  # 0 to 1: the page's own colour
    assert corner > 0.9 if scheme == "light" else corner < 0.15
    assert float(image[..., :3].std()) > 0.03  # something is drawn


def test_text_can_be_read(opened):
    """WCAG AA: a contrast of 4.5 for text, also in figures."""
    browser, _, _ = opened
    script = """
        const rgb = text => text.match(/[\\d.]+/g).map(Number);
        const luminance = c => c.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = e => {
            for (; e; e = e.parentElement) {
                const c = rgb(getComputedStyle(e).backgroundColor);
                if (c.length === 3 || c[3] > 0) return c;
            }
        };
        return [...document.querySelectorAll('h1, h2, h3, p, li span, th, td, a, summary, pre, figcaption, svg text')]
            .filter(e => !e.hidden)
            .map(e => {
                const style = getComputedStyle(e), own = rgb(e.closest('svg') ? style.fill : style.color);
                const [a, b] = [luminance(own), luminance(behind(e))].sort((x, y) => y - x);
                return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
            });
    """
    contrasts = browser.execute_script(script)
    assert len(contrasts) > 300
    assert [entry for entry in contrasts if entry[0] < 4.5] == []


def test_the_keyboard_gets_everywhere(opened):
    browser, _, _ = opened
    from selenium.webdriver import Keys

    focused = []
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused.append(browser.execute_script("const e = document.activeElement; return e.className || e.tagName"))
        if focused[-1] == "BODY":
            break
    assert focused[0] == "skip"
    num_tables = browser.execute_script("return document.querySelectorAll('table').length")
    assert focused.count("scroll") == num_tables == 5
    assert "SUMMARY" in focused


def screenshot(browser, path):
    """The whole page, as [height, width, 4] from 0 to 1; in `path` as well."""
    import base64

    from matplotlib.image import imread

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    data = base64.b64decode(shot["data"])
    path.write_bytes(data)
    return imread(io.BytesIO(data))
