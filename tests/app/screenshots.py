"""Takes the pictures of `docs/app`: `python tests/app/screenshots.py docs/app`, some minutes with three trainings."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from conftest import FLAGS, Studio
from PIL import Image
from playwright.sync_api import sync_playwright

from graft.app.models import Models
from graft.diffusion.bench.pictures import write_pictures
from graft.llm_mm.datasets import ASKED, built_in
from graft.studio.job import Job
from graft.studio.pocket.atlas import Atlas
from graft.studio.runs import Run, RunLock, create_run
from graft.studio.runs.queue import place, wait

COLOURS = 224
"""Of a picture: a page needs few, and the file is small. With fewer, rare ones such as that of a link are lost."""
LONG: dict[str, Any] = {"full_page": True, "clip": {"x": 0, "y": 0, "width": 1200, "height": 1500}}
"""The upper part of a page that is as long as a training."""


def shoot(page: Any, file: Path, **kept: Any) -> None:
    """Write what a page shows."""
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(1500)
    with Image.open(BytesIO(page.screenshot(**kept))) as taken:
        few = taken.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        few.convert("RGB").save(file, lossless=True, quality=100, method=6)
    print(file, f"{file.stat().st_size / 1000:.0f} KB", flush=True)


def write_questions(folder: Path) -> Path:
    """Scenes and a table of questions about them."""
    folder.mkdir()
    rows = ["image,question,answer"]
    for k, talk in enumerate(built_in("pocket-scenes")[:120]):
        Image.fromarray(talk.pictures[0]).save(folder / f"scene-{k:03d}.png")
        rows.append(f"scene-{k:03d}.png,{ASKED},{talk.turns[1].text}")
    (folder / "questions.csv").write_text("\n".join(rows))
    return folder


def train(studio: Studio, photos: Path, questions: Path) -> list[str]:
    """Runs by the queue of the studio: the demo's, a shorter one of lower rank, and one that answers questions."""
    os.environ["GRAFT_STATE"] = str(studio.state)
    models = Models(studio.runs)
    demo = models.ask("demo", data=str(studio.runs.parent / "data"))
    job = {"base": "pocket-sd", "domain": "diffusion", "name": "sprout", "data": {"path": str(photos)},
           "method": {"name": "lora", "rank": 2, "trigger": "sprout"}, "train": {"steps": 120},
           "sample": {"every": 60}}  # fmt: skip
    made = [demo, models.ask("start", job=job)]
    talks = {"base": "pocket-llava", "domain": "llm_mm", "name": "scenes", "data": {"path": str(questions)},
             "method": {"name": "lora"}, "train": {"steps": 150}}  # fmt: skip
    made.append(models.ask("start", job=talks))
    models.close()
    wait([Run(studio.runs / name) for name in made])
    return made


def teach(page: Any, photos: Path) -> None:
    """Pictures with a mask on one, findings, an estimate."""
    page.get_by_text("Your pictures will stand here").wait_for()
    page.get_by_label("Name").fill("sprout")
    page.set_input_files("#drop input[type=file]", [str(path) for path in sorted(photos.glob("*.png"))[:3]])
    page.get_by_text("3 pictures").wait_for()
    page.get_by_role("button", name="Cut and mask").click()
    page.locator("#picture input").click()
    page.get_by_role("option", name="0002.png").click()
    page.wait_for_timeout(2500)
    box = page.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 10, steps=8)
    page.mouse.up()
    page.locator("#save").click()
    page.locator("#estimate").wait_for(timeout=180_000)
    page.get_by_text("is saved").wait_for(state="detached")


def preview(page: Any) -> None:
    """The base beside an adapter."""
    page.get_by_label("Columns").fill("0.5, 1")
    page.locator("#show").click()
    page.locator("#shown img").nth(2).wait_for(timeout=180_000)


def labels(page: Any, questions: Path) -> None:
    """Rows of a table of questions, token by token."""
    page.get_by_text("Your pictures will stand here").wait_for()
    page.get_by_label("What it is", exact=True).click()
    page.get_by_role("option", name="Questions about pictures").click()
    page.get_by_text("Drop a .zip of pictures with a table").wait_for()
    page.set_input_files("#drop input[type=file]", [str(path) for path in sorted(questions.iterdir())])
    page.get_by_text("120 pictures and questions.csv").wait_for()
    page.get_by_label("Name").fill("scenes")
    page.locator("#look").click()
    page.locator("#labels section").nth(7).wait_for(timeout=180_000)


def chat(page: Any, questions: Path) -> None:
    """Two questions about a picture."""
    page.locator("#question textarea").wait_for()
    page.set_input_files("#seen input[type=file]", str(questions / "scene-007.png"))
    page.locator("#seen").get_by_text("scene-007").wait_for()
    for k, question in enumerate((ASKED, "what is the background colour ?")):
        page.locator("#question textarea").fill(question)
        page.locator("#ask").click()
        page.locator("#talk .asked").nth(k).wait_for(timeout=180_000)


def pages(browser: Any, studio: Studio, out: Path, runs: list[str], photos: Path, questions: Path) -> None:
    """All pages, in light and in the dark, and the first one on a phone."""
    demo, other, talk = runs
    addresses = {"runs": f"/?run={demo}", "teach": "/teach", "preview": f"/preview?adapter={demo}",
                 "compare": f"/compare?run={demo}&run={other}", "library": f"/library?adapter={demo}",
                 "labels": "/teach", "chat": f"/preview?adapter={talk}"}  # fmt: skip
    acts: dict[str, Callable[[Any], None]] = {
        "teach": lambda page: teach(page, photos), "preview": preview,
        "labels": lambda page: labels(page, questions), "chat": lambda page: chat(page, questions),
    }  # fmt: skip
    whole: dict[str, dict[str, Any]] = {"runs": LONG, "teach": {"full_page": True}, "preview": {"full_page": True}}
    for scheme in ("light", "dark"):
        for name, address in addresses.items():
            context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
            context.set_default_timeout(60_000)  # a page remembers what was chosen: each has a new browser
            page = context.new_page()
            page.goto(studio.url + address)
            page.locator(".graft").first.wait_for()
            if name in acts:
                acts[name](page)
            shoot(page, out / f"{name}-{scheme}.webp", **whole.get(name, {}))
            context.close()
    phone = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
    phone.goto(f"{studio.url}/?run={other}")
    phone.locator(".graft").first.wait_for()
    shoot(phone, out / "phone.webp")


def take(out: Path) -> None:
    """Train, let two runs wait, and take the pictures."""
    root = Path(tempfile.gettempdir()) / "studio"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    photos = write_pictures(root / "photos", Atlas.load().index("hedgehog"), captions=False)
    questions = write_questions(root / "questions")
    studio = Studio(root)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        try:
            runs = train(studio, photos, questions)
            for _ in range(100):  # the scheduler ends when all is done
                time.sleep(0.3)
            with RunLock(studio.state):
                job = Job("pocket-sd", {"name": "lora"}, {"path": str(photos)}, "diffusion")
                for order, name in enumerate(("20270101-120000-sprout-rank-16", "20270101-120100-sprout-style")):
                    create_run(job, studio.runs / name, queue=place(job.train, 5 - 5 * order, order=float(order)))
                pages(browser, studio, out, runs, photos, questions)
        finally:
            studio.process.terminate()
            browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
