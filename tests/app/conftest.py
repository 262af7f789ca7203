"""A real browser, and the pictures that the pages show."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

# Without the background flags Chromium asks for hosts of its own at every start.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --window-size=1100,1600"
)


class Browser(webdriver.Chrome):
    """Chromium that remembers what pages asked for and complained about."""

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, without the pictures that stand in the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        urls = [message["params"]["request"]["url"] for message in sent]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """Console messages since the last call."""
        return [entry["message"] for entry in self.get_log("browser")]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Debian's Chromium, headless, with a new profile."""
    options = Options()
    options.binary_location = shutil.which("chromium") or "chromium is not installed: make browser"
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Browser(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def sprite(tmp_path: Path) -> Path:
    """A small picture of a yellow disc."""
    image = Image.new("RGB", (64, 64), "steelblue")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill="gold")
    path = tmp_path / "sprite.png"
    image.save(path)
    return path
