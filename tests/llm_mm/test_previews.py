"""Rows shown as tokens, whatever their words are; answers that are drawn; a conversation for the studio's preview."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import graft
from graft.llm_mm.previews import Drawing, PreviewConfig, chat, preview
from graft.llm_mm.rows import show_rows
from graft.studio import registry
from graft.studio.adapter import Adapter, base_hash
from graft.studio.cli import main
from graft.studio.errors import InputError
from graft.studio.job import Job
from graft.studio.shown import Asked
from graft.studio.training import train

HOSTILE = (
    "<img src=x onerror=alert(1)> \x1b]0;mine\x07\x1b[31m </span><script>alert(2)</script> "
    "\" onclick='alert(3)' ${x} {{y}}"
)


class Tags(HTMLParser):
    """The tags and their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.words = set[tuple[str, ...]](), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_words_of_rows_are_words(tiny: Path, photos: Callable[[str], Path], tmp_path: Path):
    photos("a.png")
    row = {"image": "a.png", "question": HOSTILE, "answer": HOSTILE}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    shown = show_rows(Job(str(tiny), {"name": "lora"}, {"path": str(tmp_path / "rows.jsonl")}, "llm_mm"))
    page = Tags(shown.body)
    assert page.seen == {("section",), ("h2",), ("p",), ("img", "alt", "src"), ("span", "class", "title")}
    assert page.words.replace(" ", "").count("<imgsrc=xonerror=alert(1)>") == 2
    assert shown.body in shown.page
    colours = {"\033[1;32m", "\033[2m", "\033[34m", "\033[0m"}
    left = shown.text
    for colour in colours:
        left = left.replace(colour, "")
    assert "\033" not in left and "\x07" not in left and left.count("]0;") == 2


def test_rows_that_cannot_be_used_are_shown_with_the_reason(tiny: Path, photos: Callable[[str], Path], tmp_path: Path):
    photos("a.png")
    (tmp_path / "text.png").write_text("none")
    rows = [
        {"image": "a.png", "question": "what ?", "answer": "red"},
        {"image": "text.png", "question": "what ?", "answer": "red"},
        {"image": "a.png", "question": "what is it ? " * 9 + "<b>", "answer": "red"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "split": "train"}) for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "length": 90}
    job = Job(str(tiny), {"name": "lora"}, data, "llm_mm")
    shown = show_rows(job)
    assert [set(row) for row in shown.rows] == [{"row", "tokens", "learnt", "runs"}, *[{"row", "problem"}] * 2]
    assert "row 2 cannot be used: " in shown.text and "text.png: not a picture" in shown.text
    assert "its first answer ends at token" in shown.rows[2]["problem"] in shown.text
    assert shown.body.count("cannot be used</h2>") == 2 and "text.png: not a picture" in shown.body
    with pytest.raises(InputError, match="rows = 0: expected 1 or more"):
        show_rows(job, 0)


@pytest.fixture
def adapter(tiny: Path, photos: Callable[[str], Path], tmp_path: Path) -> Adapter:
    """Of one step."""
    rows = [{"image": photos(f"{k}.png").name, "question": "what ?", "answer": f"a {k}"} for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return train(
        {"base": str(tiny), "domain": "llm_mm", "method": {"name": "lora", "rank": 2},
         "data": {"path": str(tmp_path / "rows.jsonl"), "validation": 0.0, "test": 0.0},
         "train": {"steps": 2, "batch_size": 2, "device": "cpu", "threads": 1, "learning_rate": 0.1}},
        tmp_path / "run",
    ).adapter()  # fmt: skip


def test_answers_are_drawn_and_shown(adapter: Adapter, photos: Callable[[str], Path], tmp_path: Path, tiny: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    before, picture, asked = base_hash(base.modules), str(photos("0.png")), ["what is it ?", "and now ?"]
    drawn = [chat(base, adapter, [picture], asked, 6, Drawing(1.0, seed)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    state = torch.get_rng_state()
    assert [row["base"] for row in chat(base, None, [picture], asked, 6, Drawing(1.0, 3))] == [
        row["base"] for row in drawn[0]
    ]
    assert torch.equal(torch.get_rng_state(), state)
    likeliest = chat(base, adapter, [picture], asked, 6)
    assert chat(base, adapter, [picture], asked, 6, Drawing(1e-4, 9)) == likeliest  # so cold, nothing is left to chance
    assert drawn[0] != likeliest

    wanted = Asked(tuple(asked), (picture,), seed=3, settings={"tokens": 6, "temperature": 1.0})
    cells = registry.domain("llm_mm").shown(base, [adapter, adapter], wanted, tmp_path)
    assert [(cell.row, cell.column) for cell in cells if cell.row.startswith("1")] == [
        ("1. what is it ?", "base"), ("1. what is it ?", "1: lora"), ("1. what is it ?", "2: lora"),
    ]  # fmt: skip
    told = {(cell.row[3:], cell.column[:4]): cell.text for cell in cells}
    for row in drawn[0]:
        assert told[row["question"], "base"] == row["base"]
        assert told[row["question"], "1: l"] == told[row["question"], "2: l"] == row["adapter"]
    _, answers = preview(base, adapter, asked[:1], (3, 4), tmp_path, PreviewConfig(picture, 1, 6, 1.0))
    assert [row["adapter"] for row in json.loads(answers.read_text())] == [rows[0]["adapter"] for rows in drawn[1:]]
    assert base_hash(base.modules) == before


def test_the_command_line_tells_what_the_preview_tells(
    adapter: Adapter, photos: Callable[[str], Path], tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    picture = str(photos("0.png"))
    capsys.readouterr()
    asked = ["--ask", "what is it ?", "--ask", "and now ?", "--temperature", "1", "--seed", "3"]
    argv = ["chat", str(tmp_path / "run"), picture, "--tokens", "6", "--device", "cpu", *asked, "--json"]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = Asked(("what is it ?", "and now ?"), (picture,), 3, settings={"tokens": 6, "temperature": 1.0})
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    cells = registry.domain("llm_mm").shown(base, [adapter], wanted, tmp_path)
    assert [cell.text for cell in cells] == [row[side] for row in rows for side in ("base", "adapter")]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": 9.0}, {"tokens": 0}])
def test_settings_out_of_range(wrong: dict):
    with pytest.raises(InputError, match=rf"preview.{next(iter(wrong))}"):
        PreviewConfig(**wrong)
