"""The report in a real browser. Needs Chromium and its driver, as Debian packages."""

import json
import shutil

import pytest

from let_plugin.bench import report
from tests.support import synthetic_rows

pytestmark = pytest.mark.slow

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install let-plugin[dev]")
    if _CHROMIUM is None or _DRIVER is None:
        pytest.skip("no chromium or chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    yield driver
    driver.quit()


def test_the_page_as_it_is_seen(browser, tmp_path):
    """Wide and narrow, light and dark: it loads nothing, fits, and its curves change their axis."""
    from selenium.webdriver.support.ui import WebDriverWait

    path = tmp_path / "rows.jsonl"
    synthetic_rows.throughput(path, noise=0.004, device_name="a-device-whose-name-has-no-place-to-break-" * 3)
    synthetic_rows.profile(path)
    methods = {"standard": 1.0, "let@0.1": 1.05, "let@1": 2.0, "rkd@1": 1.0, "salt@1": 1.2, "random_teacher@1": 0.9}
    synthetic_rows.converge(path, methods=methods)
    report.write([path], tmp_path / "page.html")

    def texts():
        return browser.execute_script("return [...document.querySelectorAll('#figure-1 text')].map(e => e.textContent)")

    for width, scheme in ((1440, "light"), (390, "dark")):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("data:,"), browser.get_log("browser"), browser.get_log("performance")  # of what was open before
        browser.get((tmp_path / "page.html").as_uri())
        WebDriverWait(browser, 30).until(lambda b: len(b.find_elements("css selector", ".chart svg")) == 3)
        assert browser.get_log("browser") == []
        requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
        assert urls and all(url.startswith(("file://", "data:", "blob:")) for url in urls)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert {"training tokens", "let@1", "standard"} <= set(texts())
        browser.find_element("css selector", "input[value=seconds]").click()
        WebDriverWait(browser, 30).until(lambda b: "seconds, preparation included" in texts())
        assert "training tokens" not in texts()
