"""Questions about pictures as a browser sends them, and what the conversation's part of Preview makes of answers."""

import io
import json
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from graft.app import chat, questions, uploads
from graft.app.pages import preview, teach
from graft.app.place import Place
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.formats import EXAMPLES
from graft.studio.errors import InputError
from graft.studio.job import Job
from graft.studio.runs import create_run

GOAL = "Questions about pictures"
HOSTILE = "<img src=x onerror=alert(1)>"


class Models:
    """In place of the process with the models: remembers what it was asked."""

    answer: Any = "<section>rows</section>"

    def ask(self, what: str, **facts: Any) -> Any:
        self.asked = {"what": what, **facts}
        return self.answer


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "runs", tmp_path / "data", Models())  # type: ignore[arg-type]


def jpeg(text: str = "") -> bytes:
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = text
    Image.new("RGB", (32, 24), "teal").save(data, "JPEG", exif=exif)
    return data.getvalue()


def archive(path: Path, entries: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in entries.items():
            opened.writestr(name, data)
    return path


@pytest.mark.parametrize("format", EXAMPLES)
def test_every_format_is_read_from_an_archive(place: Place, tmp_path: Path, format: str) -> None:
    """Names and folders below the table are those of its rows; its own name and folder do not matter."""
    row = EXAMPLES[format].replace("cat.png", "animals/my cat.JPG")
    given = archive(
        tmp_path / "a.zip", {"set/what I ask.jsonl": row, "set/animals/my cat.JPG": jpeg("<script>"), "set/.x.jpg": b""}
    )
    folder = place.data_set(place.new_set())
    assert questions.add_files(folder, [given]) == []
    (read,) = read_rows(DataConfig(path=str(folder))).train
    (picture,) = map(Path, read.pictures)
    assert (picture.relative_to(folder).as_posix(), read.answers) == ("animals/my cat.JPG", ("A cat.",))
    with Image.open(picture) as written:
        assert (written.format, written.size, dict(written.getexif())) == ("PNG", (32, 24), {})
    assert sorted(path.name for path in folder.rglob("*")) == ["animals", "data.jsonl", "my cat.JPG"]
    assert "1 picture and data.jsonl" in questions.listing(folder)


def test_pictures_and_a_table_by_themselves(place: Place, tmp_path: Path) -> None:
    folder = place.data_set(place.new_set())
    picture, table, later = tmp_path / "cat.png", tmp_path / "mine.csv", tmp_path / "later.json"
    picture.write_bytes(jpeg())
    table.write_text("image,question,answer\ncat.png,what ?,a cat\n")
    later.write_text(f"[{EXAMPLES['llava']}]")
    assert questions.add_files(folder, [picture, table]) == []
    assert read_rows(DataConfig(path=str(folder))).train[0].answers == ("a cat",)
    assert questions.add_files(folder, [later]) == []  # takes the first one's place
    assert read_rows(DataConfig(path=str(folder))).train[0].answers == ("A cat.",)


def test_hostile_uploads_are_refused(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.data_set(place.new_set())
    for name in ("../a.png", "/tmp/a.png", "x/../../a.csv", "C:\\a.json"):
        (told,) = questions.add_files(folder, [archive(tmp_path / "a.zip", {name: jpeg()})])
        assert "leads out" in told
    names = {f"{HOSTILE}.png": "this name", "a\x1b]0;.png": "this name", "x" * 220 + ".png": "this name"}
    for name, reason in names.items():
        (told,) = questions.add_files(folder, [archive(tmp_path / "a.zip", {name: jpeg()})])
        assert reason in told
    (told,) = questions.add_files(folder, [archive(tmp_path / "a.zip", {"a.png": b"<svg onload='alert(1)'/>"})])
    assert "not a picture" in told
    (told,) = questions.add_files(folder, [archive(tmp_path / "a.zip", {"a.csv": "", "b/c.json": ""})])
    assert "2 tables: a.csv, b/c.json" in told
    bomb = archive(tmp_path / "a.zip", {"a.csv": b"\0" * (8 << 20)})
    assert "unpack" in questions.add_files(folder, [bomb])[0]
    for name, reason in (("page.html", "no picture and no table"), (".hidden.png", "this name")):
        (tmp_path / name).write_bytes(jpeg())
        assert reason in questions.add_files(folder, [tmp_path / name])[0]
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(questions, "MAX_TABLE", 10)
    (tmp_path / "a.csv").write_text("image,question,answer\n")
    assert "MB" in questions.add_files(folder, [tmp_path / "a.csv"])[0]
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    many = archive(tmp_path / "a.zip", {f"{k}.png": jpeg() for k in range(4)})
    assert len(questions.add_files(folder, [many])) == 2


def test_the_job_is_that_of_the_command_line(place: Place) -> None:
    name = place.new_set()
    job = teach.job_of(place, name, "", "Cats!", GOAL, "pocket-llava", "Quick look", "lora", '{"data.length": 512}')
    loaded = Job.load(tomllib.loads(Job.load(job).to_toml()))
    assert (loaded.domain, loaded.data, loaded.sample.every) == (
        "llm_mm", {"path": str(place.data / name), "length": 512}, 16
    )  # fmt: skip
    with pytest.raises(InputError, match="there is no table"):
        teach.checked(place, name, "", "cats", GOAL, "pocket-llava")
    (place.data / name / "questions.csv").write_text("")
    teach.checked(place, name, "", "cats", GOAL, "pocket-llava")
    with pytest.raises(InputError, match="a browser names no folders"):
        teach.checked(place, name, "", "cats", GOAL, "/models/llava")


def test_a_kept_data_set_and_a_clone_know_their_goal(place: Place) -> None:
    name = place.new_set()
    assert [update.get("__type__") for update in teach.goal_of(place, name)] == ["update"] * 3  # nothing is told
    (place.data / name / "data.json").write_text("[]")
    goal, base, method = teach.goal_of(place, name)
    assert (goal, base.value, method.value) == (GOAL, "pocket-llava", "lora")
    job = teach.job_of(place, name, "", "cats", GOAL, base.value, "Usual", "llava", '{"method.stage": 1}')
    create_run(Job.load(job), place.runs / "20260101-a")
    found = teach.cloned(place, "20260101-a")
    assert (found["goal"], found["method"], found["settings"]["method.stage"]) == (GOAL, "llava", 1)
    values = (found["name"], found["goal"], found["base"], "Usual", found["method"], json.dumps(found["settings"]))
    assert Job.load(teach.job_of(place, "", "20260101-a", *values)) == Job.load(job)


def test_rows_are_those_of_the_job(place: Place) -> None:
    job = {"base": "pocket-llava", "domain": "llm_mm"}
    assert "<section>rows</section>" in questions.shown(place, job)
    assert place.models.asked == {"what": "rows", "job": job, "count": questions.ROWS}  # type: ignore[attr-defined]


def adapter(place: Place, name: str, domain: str) -> None:
    folder = place.runs / name / "result"
    folder.mkdir(parents=True)
    (folder.parent / "job.toml").write_text(Job("pocket-llava", {"name": "lora"}, {"path": "x"}, "llm_mm").to_toml())
    (folder.parent / "state.json").write_text('{"status": "finished"}')
    (folder / "adapter.json").write_text(json.dumps({"method": "lora", "config": {}, "domain": domain, "base": "x"}))


def test_the_domain_says_whether_its_adapters_talk(place: Place) -> None:
    adapter(place, "20260101-a", "llm_mm")
    adapter(place, "20260102-b", "diffusion")
    assert preview.talks(place, ["20260101-a"])
    assert not any(preview.talks(place, names) for names in (["20260102-b"], ["20260109-none"], []))


def test_words_are_words(place: Place) -> None:
    cell = {"picture": "", "shares": {}}
    place.models.answer = [  # type: ignore[attr-defined]
        {"row": f"1. {HOSTILE}", "column": "base", "text": "", **cell},
        {"row": f"1. {HOSTILE}", "column": HOSTILE, "text": f"{HOSTILE} a cat", **cell},
    ]
    shown = chat.conversation(place, ["20260101-a"], None, [HOSTILE], 0.5, 3)
    assert "<img" not in shown and shown.count("&lt;img") == 3
    assert "(nothing)" in shown
    assert place.models.asked["asked"] == {  # type: ignore[attr-defined]
        "prompts": [HOSTILE], "pictures": [], "seed": 3, "settings": {"temperature": 0.5}
    }  # fmt: skip
    assert "<img" not in preview.table(place, place.models.ask(""))


@pytest.mark.parametrize(
    ("sent", "taken"), [("", []), ("{", []), ('{"a": 1}', []), ("3", []), ('["a", 1]', ["a", "1"])]
)
def test_what_the_page_remembers_is_not_trusted(sent: str, taken: list[str]) -> None:
    assert chat.before(sent) == taken
    assert len(chat.before(json.dumps(["x" * 9999]))[0]) == chat.LONGEST
