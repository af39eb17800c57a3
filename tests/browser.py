"""A real Chromium for the tests that open a page in one."""

import shutil

import pytest

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


def start(width: int = 1280, height: int = 900, dark: bool = False):
    """A selenium driver of a Chromium without a window; skips with the reason where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    if not BROWSER or not DRIVER:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
                 "--force-prefers-reduced-motion",
                 f"--window-size={width},{height}", *(["--force-dark-mode"] if dark else [])):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
