"""The page over runs: what it shows, and what it refuses."""

import http.client
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from graft.app.serve import make_server
from graft.studio.job import Job
from graft.studio.runs import Run, create_run
from graft.studio.runs.folder import append_line

JOB = Job(base="pocket-sd", method={"name": "lora"}, data={"path": "photos"}, domain="diffusion")


@pytest.fixture
def run(tmp_path: Path, sprite: Path) -> Run:
    """The folder of a finished run, as a training leaves it."""
    run = create_run(JOB, tmp_path / "runs" / "20260102-sprout")
    for step in range(10, 310, 10):
        append_line(run.folder / "metrics.jsonl", {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3})
    for step in (100, 200, 300):
        (run.folder / "samples" / f"{step:06d}").mkdir()
        shutil.copy(sprite, run.folder / "samples" / f"{step:06d}" / "a photo of <sks>-0.png")
    (run.folder / "log.txt").write_text("".join(f"line {number} <of> many\n" for number in range(100)))
    run.write_state(status="finished", step=300)
    return run


@pytest.fixture
def port(run: Run) -> Iterator[int]:
    server = make_server(run.folder.parent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    response = connection.getresponse()
    content = response.read().decode("latin-1")
    connection.close()
    return response.status, content, response.headers


def test_listens_on_the_loopback_interface_only(run: Run) -> None:
    with make_server(run.folder.parent) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_overview_and_run(port: int) -> None:
    status, content, headers = get(port, "/")
    assert status == 200
    assert "20260102-sprout" in content
    assert "finished" in content
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]

    status, content, _ = get(port, "/runs/20260102-sprout")
    assert status == 200
    assert "line 99 &lt;of&gt; many" in content
    assert "line 9 " not in content
    assert 'http-equiv="refresh"' not in content
    assert "name = &quot;lora&quot;" in content


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1"])
def test_other_names_are_refused(port: int, host: str) -> None:
    status, content, _ = get(port, "/", host)
    assert status == 421
    assert "sprout" not in content


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/runs/other",
        "/runs/..",
        "/runs/%2e%2e",
        "/runs/20260102-sprout/job.toml",
        "/runs/20260102-sprout/samples/../job.toml",
        "/runs/20260102-sprout/samples/%2e%2e/job.toml",
        "/runs/20260102-sprout/samples/..%2fjob.toml",
        "/runs/20260102-sprout//etc/passwd",
    ],
)
def test_only_runs_and_their_samples(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_nothing_can_be_changed(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/", body="x")
    assert connection.getresponse().status == 501
    connection.close()


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    from graft.app.serve import overview

    assert "graft train" in overview(tmp_path / "none")


def test_a_running_run_is_asked_for_again(run: Run) -> None:
    from graft.app.serve import detail
    from graft.studio.runs import RunLock

    run.write_state(status="running")
    assert "interrupted" in detail(run)
    with RunLock(run.folder):
        assert 'http-equiv="refresh"' in detail(run)


@pytest.mark.slow
def test_pages_in_a_browser(browser, port: int, tmp_path: Path) -> None:
    start = f"http://127.0.0.1:{port}/"
    browser.set_window_size(1100, 1600)
    browser.requests(), browser.complaints()
    browser.get(start)
    browser.save_screenshot(str(tmp_path / "runs.png"))
    browser.find_element(By.LINK_TEXT, "20260102-sprout").click()
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "finished" in text
    assert "line 99 <of> many" in text

    assert browser.execute_script("return [...document.images].map(image => image.naturalWidth)") == [64, 64, 64]
    assert browser.execute_script("return document.querySelectorAll('svg path').length") == 2
    assert all(url.startswith(start) for url in browser.requests())
    assert browser.complaints() == []
    assert browser.save_screenshot(str(tmp_path / "run.png"))
