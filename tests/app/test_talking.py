"""Domains in a browser: from questions to a conversation, with hostile words on the way; classes of pictures."""

import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from graft.studio.runs import list_runs

pytestmark = pytest.mark.alone
SECONDS = 120.0
MS = SECONDS * 1000
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} </span><script>alert(4)</script>"
COLOURS = ("gold", "crimson", "navy", "teal")
ASKED = "what is the colour ?"


def until(found: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What is waited for, as soon as it is there."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return value


def table(path: Path, question: str) -> Path:
    """A question about each of twelve pictures."""
    rows = [f"my scene {k}.jpg,{question},{colour}" for k, colour in enumerate(COLOURS * 3)]
    path.write_text("\n".join(["image,question,answer", *rows]))
    return path


def packed(folder: Path) -> Path:
    """A .zip of a folder with twelve pictures, named as their owner likes, and a table of hostile questions."""
    folder.mkdir()
    for k, colour in enumerate(COLOURS * 3):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8 + k, 14, 40 + k, 50), fill=colour)
        image.save(folder / f"my scene {k}.jpg")
    table(folder / "what I ask.csv", f"{HOSTILE} {ASKED}")
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"a folder/{file.name}")
    return path


def careful(watched: Any) -> Any:
    """The page, where a dialog is a complaint: no word of a user's may run."""
    watched.page.on("dialog", lambda dialog: (watched.complaints.append(dialog.message), dialog.dismiss()))
    return watched.page


def drop(page: Any, where: str, *files: Path) -> None:
    """Put files into a field, where others may lie."""
    page.set_input_files(f"{where} input[type=file]", [str(file) for file in files])


def ask(page: Any, question: str, turns: int) -> list[str]:
    """Ask, and return all answers once there are that many turns: base, adapter, base, adapter, ..."""
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    page.locator("#talk .asked").nth(turns - 1).wait_for(timeout=MS)
    assert page.locator("#talk .asked").count() == turns
    return [said.strip() for said in page.locator("#talk .said").all_inner_texts()]


def test_from_a_folder_with_questions_to_a_conversation(studio, new_page, tmp_path) -> None:
    """A new user's way; nothing behind "Advanced" is touched."""
    watched = new_page()
    page = careful(watched)
    page.goto(f"{studio.url}/teach")
    page.get_by_text("Your pictures will stand here").wait_for()
    page.get_by_label("What it is", exact=True).click()
    page.get_by_role("option", name="Questions about pictures").click()
    page.get_by_text("Drop a .zip of pictures with a table").wait_for()
    drop(page, "#drop", packed(tmp_path / "set"))
    page.get_by_text("12 pictures and questions.csv").wait_for()
    page.reload()
    page.get_by_text("12 pictures and questions.csv").wait_for()
    page.locator("#look").wait_for()
    page.get_by_label("Name").fill("colours")
    page.get_by_text('name = "colours"').wait_for()
    assert page.locator("input:visible, textarea:visible").count() <= 8 + 2  # the three of quality are one field

    page.locator("#look").click()
    page.locator("#labels section").nth(7).wait_for(timeout=MS)
    assert HOSTILE.replace(" ", "") in page.locator("#labels section").first.inner_text().replace(" ", "")
    learnt = "".join(page.locator("#labels section .learnt").all_inner_texts()).split("<|endoftext|>")
    assert set(map(str.strip, learnt)) - {""} <= set(COLOURS)
    assert len(learnt) == 8 + 1
    assert page.locator("#labels section span.image").all_inner_texts() == ["[picture, 64 tokens]"] * 8
    assert page.locator("#labels script, #labels [onerror], #labels [src=x]").count() == 0
    assert page.evaluate("[...document.querySelectorAll('#labels img')].every(i => i.naturalWidth == 64)")

    (tmp_path / "broken.jsonl").write_text('{"<img src=x onerror=alert(5)>": 1}')
    drop(page, "#drop", tmp_path / "broken.jsonl")
    page.get_by_text("12 pictures and data.jsonl").wait_for()
    page.locator("#look").click()
    page.get_by_text("has the keys <img src=x onerror=alert(5)>, which no format has").wait_for(timeout=MS)
    assert not any(url.endswith("/x") for url in watched.requests)
    drop(page, "#drop", table(tmp_path / "plain.csv", ASKED))
    page.get_by_text("12 pictures and questions.csv").wait_for()

    page.get_by_label("Quick look").click()
    page.get_by_text("steps = 100").wait_for()
    page.get_by_text("# graft train job.toml --runs runs").wait_for()
    page.locator("#start").click()
    page.wait_for_url("**/?run=*", timeout=MS)
    (run,) = until(lambda: list_runs(studio.runs))
    until(lambda: run.status == "finished")
    page.get_by_text("Preview it").click()
    page.locator("#question textarea").wait_for()
    assert page.locator("#show:visible, #prompts:visible").count() == 0
    drop(page, "#seen", tmp_path / "set" / "my scene 0.jpg")
    page.locator("#seen").get_by_text("my scene").wait_for()
    first = ask(page, ASKED, 1)
    assert len(first) == 2
    assert first[1] == "gold"  # by the adapter, which was taught it
    both = ask(page, f"{HOSTILE} ?", 2)
    assert (both[:2], len(both)) == (first, 4)
    assert page.locator("#talk .asked").nth(1).inner_text() == f"2. {HOSTILE} ?"
    until(lambda: page.evaluate("document.querySelector('#talk img').naturalWidth == 64"), 20)
    page.locator("#again").click()
    page.locator("#talk").wait_for(state="detached")
    page.get_by_label("number input for Temperature").fill("2")
    page.get_by_label("number input for Temperature").press("Tab")
    assert len(ask(page, ASKED, 1)) == 2
    assert watched.outside(studio.url) == []
    assert watched.complaints == []


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of four pictures, told apart by their colour."""
    for name, colours in {"red": ("red", "tomato", "brown"), "blue <b>": ("blue", "navy", "cyan")}.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (64, 64), colour).save(tmp_path / "classes" / name / f"{colour}.png")
    return tmp_path / "classes"


def test_classes_of_pictures(studio, new_page, classes) -> None:
    """Bars beside each picture, by the base and by the adapter, and the known pictures nearest to it."""
    import graft

    watched = new_page()
    page = careful(watched)
    for base, domain, method in (("pocket-vit", "vision", "linear"), ("pocket-clip", "vlm", "tip_adapter")):
        job = {"base": base, "domain": domain, "method": {"name": method}, "data": {"path": str(classes)},
               "train": {"steps": 3, "batch_size": 2}}  # fmt: skip
        run = graft.train(job, runs=studio.runs)
        page.goto(f"{studio.url}/preview?adapter={run.id}")
        page.locator("#adapters").get_by_text(run.id).first.wait_for()
        assert page.locator("#question:visible").count() == 0
        drop(page, "#pictures", classes / "red" / "red.png", classes / "blue <b>" / "navy.png")
        page.locator("#pictures").get_by_text("navy").wait_for()
        page.locator("#show").click()
        page.locator("#shown tbody tr").nth(1).wait_for(timeout=MS)
        assert page.locator("#shown thead th").all_inner_texts() == ["", "base", method, "nearest known"]
        assert page.locator("#shown tbody tr").count() == 2
        near = [row.locator("td").nth(2).inner_text() for row in page.locator("#shown tbody tr").all()]
        assert near[0].startswith("red 1.00, ")  # each of the two is a known one itself
        assert near[1].startswith("blue <b> 1.00, ")
        assert page.locator("#shown td img").count() == 2
        until(lambda: page.evaluate("[...document.querySelectorAll('#shown img')].every(i => i.naturalWidth > 0)"), 20)
        for row in page.locator("#shown tbody tr").all():
            assert row.locator("th img").count() == 1
            cell = row.locator("td").nth(1)
            assert set(cell.locator("dt").all_inner_texts()) == {"red", "blue <b>"}
            shares = [float(value) for value in cell.locator("meter").evaluate_all("all => all.map(m => m.value)")]
            assert sum(shares) == pytest.approx(1, abs=1e-3)
            assert shares == sorted(shares, reverse=True)
            assert cell.locator(".number").all_inner_texts() == [f"{share:.0%}" for share in shares]
    assert watched.outside(studio.url) == []
    assert watched.complaints == []
