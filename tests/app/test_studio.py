"""The studio in a browser: a new user's whole way, and what may happen to it."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from graft.studio.disk import append_line
from graft.studio.job import Job
from graft.studio.pocket.atlas import Atlas
from graft.studio.runs import Run, RunLock, create_run, list_runs
from graft.studio.runs.queue import place
from graft.studio.runs.stop import stop_run

pytestmark = pytest.mark.alone
SECONDS = 300.0


def until(found: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What is waited for, as soon as it is there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError("it did not happen")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Five pictures of a sprite that no embedded model has seen."""
    from graft.diffusion.bench.pictures import write_pictures

    folder = write_pictures(tmp_path / "photos", Atlas.load().index("hedgehog"), captions=False)
    return sorted(folder.glob("*.png"))


def teach(watched: Any, url: str, photos: list[Path], steps: int) -> None:
    """The form as a new user fills it; the number of steps alone is changed behind "Advanced"."""
    page = watched.page
    page.goto(f"{url}/teach")
    page.get_by_text("Your pictures will stand here").wait_for()
    page.get_by_label("Name").fill("sprout")
    page.set_input_files("#drop input[type=file]", [str(path) for path in photos])
    page.get_by_text("5 pictures").wait_for()
    page.locator('img[alt="0005.png"]').wait_for()
    assert page.locator("input:visible, textarea:visible").count() <= 8 + len(photos) + 3  # captions, radio buttons
    page.get_by_role("button", name="Advanced").click()
    page.get_by_role("button", name="[train]").click()
    page.get_by_label("steps", exact=True).fill(str(steps))
    page.get_by_label("log_every").fill("1")
    page.get_by_label("log_every").press("Tab")
    page.get_by_text(f"steps = {steps}").wait_for()
    page.get_by_text("log_every = 1").wait_for()
    page.locator("#start").click()


def newest(runs: Path) -> Run:
    run: Run = until(lambda: list_runs(runs))[-1]
    return run


def test_from_five_pictures_to_a_preview(studio, new_page, photos) -> None:
    assert studio.megabytes() < 250
    watched = new_page()
    page = watched.page
    page.goto(studio.url)
    page.get_by_text("No runs yet").wait_for()
    teach(watched, studio.url, photos, steps=6)
    page.wait_for_url("**/?run=*", timeout=SECONDS * 1000)
    run = newest(studio.runs)
    until(lambda: run.status == "finished")
    page.locator(".status.finished").first.wait_for()
    page.locator(".graft svg path").first.wait_for()
    assert page.locator('.grid img[src*="samples"]').count() == 3  # two steps, and the sheet of all
    assert 'trigger = "sprout"' in page.locator(".graft pre").all_text_contents()[0]

    page.get_by_text("Preview it").click()
    page.locator("#adapters").get_by_text(run.id).first.wait_for()
    page.locator("#show").click()
    page.locator("#shown img").nth(1).wait_for(timeout=SECONDS * 1000)
    assert page.locator("#shown img").count() == 2
    until(lambda: page.evaluate("[...document.querySelectorAll('#shown img')].every(i => i.naturalWidth == 64)"), 20)
    assert studio.megabytes() < 250
    assert watched.outside(studio.url) == []
    assert watched.complaints == []


@pytest.fixture
def training(studio, photos, monkeypatch) -> Run:
    """A run of many steps in the studio, begun as its first page begins one."""
    from graft.app.models import Models

    monkeypatch.setenv("GRAFT_STATE", str(studio.state))

    job = {
        "base": "pocket-sd", "domain": "diffusion", "name": "long",
        "method": {"name": "lora", "trigger": "sprout"}, "data": {"path": str(photos[0].parent)},
        "train": {"steps": 100_000, "log_every": 1, "checkpoint_every": 1},
    }  # fmt: skip
    models = Models(studio.runs)
    run = studio.runs / models.ask("start", job=job)
    models.close()
    until(lambda: len(Run(run).metrics()) > 3)
    return Run(run)


def step_of(page: Any) -> int:
    text = page.locator(".graft .figures dd").first.inner_text()
    return int(text.split(" of ")[0])


def test_nothing_is_lost(studio, new_page, training) -> None:
    """Reload, a second tab, a killed server, stop and resume, in the middle of a run."""
    watched, second = new_page(), new_page(width=390, height=800)
    page, other = watched.page, second.page
    page.goto(studio.url)
    until(lambda: step_of(page) > 0)
    page.reload()
    before = until(lambda: step_of(page))
    other.goto(f"{studio.url}/?run={training.id}")
    until(lambda: step_of(other) >= before)
    assert other.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert watched.complaints == []

    studio.kill()
    steps = len(training.metrics())
    until(lambda: len(training.metrics()) > steps + 1)  # it trains on
    studio.start()
    shown = len(training.metrics())
    until(lambda: step_of(page) >= shown)  # the page that was open all the time, not reloaded

    page.get_by_role("button", name="Stop").click()
    until(lambda: training.status == "stopped")
    page.locator(".status.stopped").first.wait_for()
    stopped = int(training.state["step"])
    page.get_by_role("button", name="Resume").click()
    until(lambda: int(training.state["step"]) > stopped)
    page.locator(".graft.runs .status.running").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    until(lambda: training.status == "stopped")
    assert watched.outside(studio.url) == []


def test_the_queue_is_ordered_by_keyboard(studio, new_page) -> None:
    """Nothing trains in it: the test holds the place of the scheduler."""
    job = Job("pocket-sd", {"name": "lora"}, {"path": "photos"}, "diffusion")
    studio.state.mkdir(exist_ok=True)
    with RunLock(studio.state):
        for order, name in enumerate(("20260103-c", "20260104-d", "20260105-e")):
            create_run(job, studio.runs / name, queue=place(job.train, order=float(order)))
        watched, second = new_page(), new_page(width=390, height=800)
        page, other = watched.page, second.page
        page.goto(f"{studio.url}/?run=20260105-e")
        other.goto(studio.url)
        page.get_by_text("place 3, priority 0").wait_for()
        page.get_by_role("button", name="Earlier").focus()
        page.keyboard.press("Enter")
        until(lambda: [shown.locator(".graft.runs .name").nth(1).inner_text() for shown in (page, other)]
              == ["20260105-e"] * 2, 20)  # fmt: skip
        page.get_by_label("Priority").fill("3")
        page.keyboard.press("Enter")
        other.get_by_text("place 1, priority 3").wait_for()
        page.get_by_role("button", name="Stop").click()
        until(lambda: Run(studio.runs / "20260105-e").status == "stopped", 30)
        page.locator("#places").wait_for(state="hidden")
        assert other.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert watched.complaints == second.complaints == []


def finished(runs: Path, name: str, rank: int, sprite: Path) -> Run:
    """The folder of a finished run with a hostile name in its log and card, as a training leaves it."""
    job = Job(
        base="pocket-sd", method={"name": "lora", "rank": rank, "trigger": "<img src=x onerror=alert(1)>"},
        data={"path": "photos"}, domain="diffusion",
    )  # fmt: skip
    run = create_run(job, runs / name)
    for step in range(10, 310, 10):
        append_line(run.folder / "metrics.jsonl", {"step": step, "loss": rank / step, "seconds": step / 10})
    (run.folder / "samples" / "000300").mkdir()
    shutil.copy(sprite, run.folder / "samples" / "000300" / "a <script>alert(1)<-script>-0.png")
    (run.folder / "log.txt").write_text("<script>alert(1)</script> ${alert(2)} {{alert(3)}}\n")
    (run.folder / "result").mkdir()
    card = {"method": "lora", "config": {"rank": rank}, "domain": "diffusion", "base": "pocket-sd",
            "trigger": "<img src=x onerror=alert(1)>", "metrics": {"loss": 0.1}, "created": "2026-01-02"}  # fmt: skip
    (run.folder / "result" / "adapter.json").write_text(json.dumps(card))
    run.write_state(status="finished", step=300, message="<b onclick=alert(1)>done</b>")
    return run


def test_compare_and_library(studio, new_page, sprite) -> None:
    for name, rank in (("20260102-one", 4), ("20260103-two", 8)):
        finished(studio.runs, name, rank, sprite)
    watched = new_page()
    page = watched.page
    page.on("dialog", lambda dialog: watched.complaints.append(dialog.message))
    page.goto(studio.url)
    page.get_by_text("<script>alert(1)</script> ${alert(2)} {{alert(3)}}").wait_for()
    page.get_by_text("<b onclick=alert(1)>done</b>").wait_for()

    page.goto(f"{studio.url}/compare")
    page.locator(".graft svg").first.wait_for()
    assert page.locator(".graft svg").first.locator("path").count() == 4
    row = page.locator("tr", has_text="method.rank")
    assert [cell.inner_text() for cell in row.locator("td").all()] == ["method.rank", "8", "4"]
    page.get_by_role("button", name="Blind vote").click()
    page.get_by_role("button", name="Left is better").click()
    page.get_by_text("1 votes").wait_for()
    page.get_by_role("button", name="Export").click()
    link = page.locator('a[href*="exports"]')
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    content = Path(download.value.path()).read_text()
    assert "20260103-two" in content
    assert "<script" not in content

    page.goto(f"{studio.url}/library?adapter=20260102-one")
    page.get_by_label("Search").fill("two lora")
    page.locator(".graft.runs a", has_text="20260102-one").wait_for(state="detached")
    page.get_by_label("Search").fill("")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Undo").wait_for()
    assert [run.id for run in list_runs(studio.runs)] == ["20260103-two"]
    page.get_by_role("button", name="Undo").click()
    until(lambda: len(list_runs(studio.runs)) == 2, 30)
    assert watched.outside(studio.url) == []
    assert watched.complaints == []


def test_pages_on_a_phone_in_the_dark_by_keyboard(studio, new_page, sprite) -> None:
    finished(studio.runs, "20260102-one", 4, sprite)
    watched = new_page(width=390, height=800, dark=True)
    page = watched.page
    for path in ("/", "/teach", "/preview", "/compare", "/library"):
        page.goto(studio.url + path)
        page.locator(".graft").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
        assert page.evaluate("document.body.classList.contains('dark')"), path
        links = page.evaluate("[...document.querySelectorAll('.nav-holder a')].map(a => a.offsetTop)")
        assert (len(links), len(set(links))) == (5, 1), "the bar of pages has one line"
    page.goto(studio.url)
    page.locator(".graft.runs a").wait_for()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
    assert any("20260102-one" in text for text in reached)
    assert watched.complaints == []


LIGHT = """element => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const weights = [.2126, .7152, .0722];
  const light = colour => weights.reduce((sum, weight, k) => sum + weight * linear(channels(colour)[k] / 255), 0);
  let behind = element;
  while (behind.parentElement && channels(getComputedStyle(behind).backgroundColor)[3] === 0)
    behind = behind.parentElement;
  return [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
}"""
"""Relative luminance of an element's text and of what is behind it, as WCAG has it."""


@pytest.mark.parametrize("dark", [False, True])
def test_small_print_and_buttons_can_be_read(studio, new_page, dark: bool) -> None:
    page = new_page(dark=dark).page
    page.goto(f"{studio.url}/teach")
    page.get_by_text("Your pictures will stand here").wait_for()
    texts = [".nav-holder a:not(.active)", "#start", "#check", "text=One word for it", "text=Your pictures will stand"]
    for text in texts:
        low, high = sorted(page.locator(text).first.evaluate(LIGHT))
        assert (high + 0.05) / (low + 0.05) >= 4.5, text


def test_the_figures(studio, new_page, training) -> None:
    """First page load, requests of an open tab while a run is live, memory of the server: printed with -s, and held."""
    loads, megabytes = [], [studio.megabytes()]
    for number in range(4):
        page = new_page().page
        began = time.monotonic()
        page.goto(studio.url)
        page.locator(".graft.runs a").first.wait_for()
        loads.append(time.monotonic() - began)
        megabytes.append(studio.megabytes())
        if number < 3:
            page.context.close()
    watched = new_page(width=390, height=800)
    watched.page.goto(studio.url)
    until(lambda: step_of(watched.page) > 0)
    began, before, ticks = time.monotonic(), len(watched.requests), studio.processor_seconds()
    watched.page.wait_for_timeout(10_000)
    seconds = time.monotonic() - began
    rate, busy = (len(watched.requests) - before) / seconds, (studio.processor_seconds() - ticks) / seconds
    megabytes.append(studio.megabytes())
    stop_run(training)
    print(f"first load {loads[0]:.2f} s, later ones {min(loads[1:]):.2f} s; {rate:.2f} requests/s of a tab; "
          f"two tabs take {busy:.1%} of a core; {max(megabytes):.0f} MB without a model")  # fmt: skip
    assert min(loads) < 2.5
    assert 0.2 < rate < 3
    assert max(megabytes) < 250


def test_what_is_told_before_the_start(studio, new_page, photos, tmp_path) -> None:
    """A picture that was dropped twice is found, and what the training takes is measured, before it starts."""
    watched = new_page(width=390, height=900)
    page = watched.page
    page.goto(f"{studio.url}/teach")
    page.get_by_text("Your pictures will stand here").wait_for()
    page.set_input_files("#drop input[type=file]", [str(path) for path in (*photos, photos[0])])
    finding = page.locator("#findings li.warning").first
    finding.wait_for()
    assert "0006.png: the same file as 0001.png" in finding.inner_text()
    assert "Remove all but one" in finding.inner_text()
    told = page.locator("#estimate")
    told.wait_for(timeout=SECONDS * 1000)
    numbers = re.fullmatch(
        r"About ([\d.]+ \w+), ([\d.]+ GB) of memory on \w+.*, ([\d.]+ MB) on disk.*", told.inner_text()
    )
    assert numbers, told.inner_text()
    page.get_by_text("Thorough").click()  # known at once: nothing is measured again
    until(lambda: not told.inner_text().startswith(f"About {numbers[1]},"), 10)
    assert f"{numbers[2]} of memory" in told.inner_text()
    assert list_runs(studio.runs) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert watched.complaints == []


def test_a_mask_is_painted_and_a_picture_cut(studio, new_page, photos) -> None:
    from graft.diffusion.data import DataConfig, load_dataset
    from graft.studio.caches import Cache

    watched = new_page()
    page = watched.page
    page.goto(f"{studio.url}/teach")
    page.get_by_text("Your pictures will stand here").wait_for()
    page.set_input_files("#drop input[type=file]", [str(path) for path in photos[:2]])
    page.get_by_text("2 pictures").wait_for()
    (folder,) = (studio.runs.parent / "data").iterdir()
    page.get_by_role("button", name="Cut and mask").click()

    def choose(name: str) -> dict[str, float]:
        page.locator("#picture input").click()
        page.get_by_role("option", name=name).click()
        page.wait_for_timeout(1500)  # the editor scales the picture to its place
        box: dict[str, float] = page.locator("#canvas canvas").first.bounding_box()
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    def drag(*places: tuple[float, float]) -> None:
        page.mouse.move(*places[0])
        page.mouse.down()
        for each in places[1:]:
            page.mouse.move(*each, steps=6)
        page.mouse.up()

    middle = choose("0001.png")
    drag((middle["x"] - 30, middle["y"]), (middle["x"] + 30, middle["y"]))
    page.locator("#save").click()
    until(lambda: (folder / "0001.mask.png").is_file(), 20)
    data = load_dataset(DataConfig(str(folder)), 64, Cache(folder.parent / "cache"))
    assert data.masks is not None
    marked = data.masks[0, 0, 0].numpy() > 0
    assert marked[32, 24:40].all() and 0.02 < marked.mean() < 0.9 and not marked[:4].any()

    middle = choose("0002.png")
    page.get_by_label("Image", exact=True).click()
    page.get_by_label("Crop").first.click()
    page.wait_for_timeout(500)
    left, top = middle["x"] - 124, middle["y"] - 144  # the frame's corner; below it is room for a button
    drag((left, top), (left + 90, top + 90))
    page.get_by_label("Confirm crop").click()
    page.wait_for_timeout(500)
    page.locator("#save").click()
    until(lambda: (folder / ".originals" / "0002.png").is_file(), 20)
    with Image.open(folder / "0002.png") as cut:
        assert min(cut.size) >= 8 and max(cut.size) < 64
    page.locator("#back").click()
    until(lambda: not (folder / ".originals" / "0002.png").exists(), 20)
    assert (folder / "0002.png").stat().st_size > 0
    assert watched.outside(studio.url) == []
    assert watched.complaints == []
