"""A real Chromium for the tests that open a page in one."""

import importlib.util
import shutil
import time
from pathlib import Path

import pytest

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


def start(width: int = 1280, height: int = 900, dark: bool = False):
    """A selenium driver of a Chromium without a window; skips with the reason where there is none. Its profile is a fresh
    one: chromedriver makes it, and removes it."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    if not BROWSER or not DRIVER:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
                 "--disable-quic", "--no-first-run", "--disable-component-update", "--disable-sync",
                 "--force-prefers-reduced-motion", f"--window-size={width},{height}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    screen(driver, dark=dark)
    return driver


def screen(driver, width: int | None = None, height: int = 900, dark: bool = False) -> None:
    """Show pages on a screen of `width` CSS pixels (by default the window's own), light or dark."""
    if width:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    else:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def press(driver, *keys: str) -> None:
    """Press keys, of selenium's Keys or characters, wherever the focus is."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def wait(look, said="nothing came", seconds: float = 60):
    """What `look` returns once it is true; it may fail while the page is still building."""
    deadline, last = time.time() + seconds, None
    while time.time() < deadline:
        try:
            if found := look():
                return found
        except Exception as error:
            last = error
        time.sleep(0.1)
    raise TimeoutError(f"{said() if callable(said) else said} ({last})")


def faults_for_readers(driver) -> list[str]:
    """What axe-core calls serious or critical on the page as it is."""
    found = importlib.util.find_spec("axe_playwright_python")  # for the axe-core in it: the driver here is selenium's
    if found is None:
        pytest.skip("axe-core is not installed (axe-playwright-python, of requirements-dev.txt)")
    driver.execute_script(Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = driver.execute_async_script(
        "axe.run().then(arguments[0], (error) => arguments[0]({failed: String(error)}))"
    )
    assert "failed" not in found, found
    assert len(found["passes"]) > 10, "axe looked at the page"
    return [
        f"{fault['impact']} {fault['id']}: {node['html'][:150]} {node['failureSummary']}"
        for fault in found["violations"]
        for node in fault["nodes"]
        if fault["impact"] in ("serious", "critical")
    ]
