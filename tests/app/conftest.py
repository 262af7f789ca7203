"""A real browser, a studio in a process of its own, and the pictures that the pages show."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

# Without the background flags Chromium asks for hosts of its own at every start.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


class Watched:
    """A page of the browser that remembers what it asked for and complained about."""

    def __init__(self, page: Any):
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self._fault(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._fault(str(error)))

    def _fault(self, text: str) -> None:
        # Gradio gives up its requests when a page is left, such as the check of a job that goes on meanwhile
        if "AbortError" not in text and "Connection errored out" not in text:
            self.complaints.append(text)

    def outside(self, own: str) -> list[str]:
        """Addresses asked for that are not the page's own."""
        return [url for url in self.requests if not url.startswith((own, "data:", "blob:"))]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless, without a network but this machine's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or "chromium is not installed: make browser"
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Watched]]:
    """Opens pages, each with a fresh profile; `new_page(width=390)` is a phone's, `dark=True` has the dark look."""
    contexts = []

    def open_page(width: int = 1200, height: int = 900, dark: bool = False) -> Watched:
        scheme = "dark" if dark else "light"
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(60_000)
        contexts.append(context)
        return Watched(context.new_page())

    yield open_page
    for context in contexts:
        context.close()


class Studio:
    """`graft ui` in a process of its own, which may be killed and started again."""

    def __init__(self, root: Path):
        self.runs, self.log, self.state = root / "runs", root / "ui.log", root / "state"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "graft", "ui", "--port", str(self.port), "--runs", str(self.runs)]
        with self.log.open("ab") as log:
            own = {"OMP_NUM_THREADS": "1", "GRAFT_STATE": str(self.state)}  # its own queue
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own)
        for _ in range(600):
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def megabytes(self) -> float:
        """Memory that the server has now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

    def processor_seconds(self) -> float:
        """Time that the server has computed so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    """An empty studio."""
    running = Studio(tmp_path)
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture
def sprite(tmp_path: Path) -> Path:
    """A small picture of a yellow disc."""
    image = Image.new("RGB", (64, 64), "steelblue")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill="gold")
    path = tmp_path / "sprite.png"
    image.save(path)
    return path
