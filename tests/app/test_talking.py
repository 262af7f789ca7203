"""Questions about pictures in a browser: from a folder with a table to a conversation, and hostile words on the way."""

import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from graft.studio.runs import list_runs

pytestmark = pytest.mark.slow
SECONDS = 120.0
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} <script>alert(4)</script>"


def until(found: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What is waited for, as soon as it is there."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return value


def scenes(folder: Path, words: str = "") -> Path:
    """A .zip of a folder with twelve pictures, named as their owner likes, and a question about each."""
    folder.mkdir()
    rows = ["image,question,answer"]
    for k, colour in enumerate(("gold", "crimson", "navy", "teal") * 3):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8 + k, 14, 40 + k, 50), fill=colour)
        image.save(folder / f"my scene {k}.jpg")
        rows.append(f"my scene {k}.jpg,what is the colour ?{words if k % 2 else ''},{colour}")
    (folder / "answers of mine.csv").write_text("\n".join(rows))
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"a folder/{file.name}")
    return path


def choose(page: Any, label: str, value: str) -> None:
    """Choose of a dropdown."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=value, exact=True).click()


def test_from_a_folder_with_questions_to_a_conversation(studio, new_page, tmp_path, sprite) -> None:
    """A new user's way; nothing behind "Advanced" is touched."""
    watched = new_page()
    page = watched.page
    page.goto(f"{studio.url}/teach")
    page.get_by_text("Your pictures will stand here").wait_for()
    page.get_by_label("Name").fill("colours")
    choose(page, "What it is", "Questions about pictures")
    page.get_by_text("Drop a .zip of pictures with a table").wait_for()
    page.set_input_files("#drop input[type=file]", str(scenes(tmp_path / "set")))
    page.get_by_text("12 pictures and questions.csv").wait_for()
    assert page.locator("input:visible, textarea:visible").count() <= 8 + 2  # three radio buttons are one field
    page.locator("#look").click()
    page.locator("#labels section").nth(7).wait_for(timeout=SECONDS * 1000)
    page.screenshot(path="/tmp/wt/appllm-teach.png", full_page=True)
    page.get_by_label("Quick look").click()
    page.locator("#start").click()
    page.wait_for_url("**/?run=*", timeout=SECONDS * 1000)
    (run,) = until(lambda: list_runs(studio.runs))
    until(lambda: run.status == "finished")
    page.screenshot(path="/tmp/wt/appllm-runs.png")
    page.get_by_text("Preview it").click()
    page.locator("#question textarea").fill("what is the colour ?")
    page.set_input_files("#seen input[type=file]", str(sprite))
    page.get_by_text("sprite").wait_for()
    page.locator("#ask").click()
    page.locator("#shown .said").nth(1).wait_for(timeout=SECONDS * 1000)
    page.screenshot(path="/tmp/wt/appllm-chat.png")
    print(page.locator("#shown").inner_text())
    assert watched.outside(studio.url) == []
    assert watched.complaints == []
