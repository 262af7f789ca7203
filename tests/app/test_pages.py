"""What the pages say and do, without a browser."""

import json
import re
import sys
import tomllib
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from graft.app import check, files, forms, goals, worker
from graft.app.handlers import changed
from graft.app.pages import compare, library, preview, runs, teach
from graft.app.place import Place
from graft.app.server import is_loopback
from graft.studio import registry
from graft.studio.errors import InputError
from graft.studio.estimate import Estimate
from graft.studio.job import Job
from graft.studio.runs import RunLock, create_run, queue

JOB = Job(base="pocket-sd", method={"name": "lora", "rank": 4}, data={"path": "photos"}, domain="diffusion")
CARD = {"method": "lora", "config": {"rank": 4}, "domain": "diffusion", "base": "pocket-sd", "trigger": "<b>sks"}


class NoModels:
    """In place of the process with the models."""

    def ask(self, what: str, **facts: Any) -> Any:
        self.asked = {"what": what, **facts}
        return []


@pytest.fixture
def place(tmp_path: Path, sprite: Path) -> Place:
    """Two runs, one with an adapter."""
    place = Place(tmp_path / "runs", tmp_path / "data", NoModels())  # type: ignore[arg-type]
    for name, rank in (("20260101-a", 4), ("20260102-b", 8)):
        job = Job(JOB.base, JOB.method | {"rank": rank}, JOB.data, JOB.domain)
        run = create_run(job, place.runs / name)
        run.write_state(status="finished", step=300, message="<i>done</i>")
        (run.folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5, "seconds": 4.0, "accuracy": 0.25}\n')
        (run.folder / "samples" / "000010").mkdir()
        sprite_copy = run.folder / "samples" / "000010" / "a.png"
        sprite_copy.write_bytes(sprite.read_bytes())
    result = place.runs / "20260101-a" / "result"
    result.mkdir()
    (result / "adapter.json").write_text(json.dumps(CARD))
    return place


def test_a_run_in_full(place: Place) -> None:
    board, head, body, log, stop, resume, demo, places, _ = runs.view(place, "20260102-b")
    assert not places.visible
    assert 'aria-current="page"><span class="name">20260102-b' in board
    assert "&lt;i&gt;done&lt;/i&gt;" in head
    assert body.count("<svg") == 2  # a curve for the loss, one for the accuracy
    assert "/files/runs/20260102-b/samples/000010/a.png" in body
    assert log == ""
    assert (stop.interactive, resume.interactive, demo.visible) == (False, False, False)


def test_buttons_follow_the_lock(place: Place) -> None:
    run = place.run("20260102-b")
    run.write_state(status="running")
    assert [button.interactive for button in runs.view(place, run.id)[4:6]] == [False, True]  # interrupted
    with RunLock(run.folder):
        assert [button.interactive for button in runs.view(place, run.id)[4:6]] == [True, False]


def test_the_queue_is_shown_in_its_order_and_changed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    for name, order in (("20260103-c", 1.0), ("20260104-d", 2.0), ("20260105-e", 3.0)):
        create_run(JOB, place.runs / name, queue=queue.place(JOB.train, order=order))

    def line() -> list[str]:
        return re.findall(r"run=(\w+-\w+)", runs.view(place, "20260104-d")[0])

    done = ["20260102-b", "20260101-a"]
    with RunLock(tmp_path / "state"):  # so that nobody trains them
        assert line() == ["20260103-c", "20260104-d", "20260105-e", *done]
        assert "place 2, priority 0" in runs.view(place, "")[0]
        run = place.run("20260104-d")
        for word, expected in (("Earlier", "dce"), ("Last", "ced"), ("First", "dce"), ("Later", "cde")):
            runs.MOVES[word](run)
            assert "".join(name[-1] for name in line()[:3]) == expected, word
        runs.rank(run, 7)
        assert "".join(name[-1] for name in line()[:3]) == "dce"
        shown = runs.view(place, run.id)
        assert (shown[-2].visible, shown[-1].value) == (True, 7)
    run.write_state(status="running")
    runs.rank(run, 9)  # it no longer waits: nothing happens
    assert run.state["queue"]["priority"] == 7


def test_what_a_page_shows_already_is_not_sent_again(place: Place) -> None:
    _, seen = changed(runs.view(place, "20260102-b"), [""] * runs.SHOWN)
    values, seen = changed(runs.view(place, "20260102-b"), seen)
    assert all(value == gr.skip() for value in values)
    place.run("20260102-b").write_state(status="stopped")
    values, _ = changed(runs.view(place, "20260102-b"), seen)
    assert [value == gr.skip() for value in values] == [False, False, True, True, True, False, True, True, True]


def test_an_empty_studio_offers_the_demo(tmp_path: Path) -> None:
    place = Place(tmp_path / "runs", tmp_path / "data", NoModels())  # type: ignore[arg-type]
    board, *_, demo, _, _ = runs.view(place, "")
    assert "No runs yet" in board
    assert demo.visible
    runs.begin_demo(place)
    assert place.models.asked == {"what": "demo", "data": str(place.data)}  # type: ignore[attr-defined]


GOAL_METHODS = [
    (goal, each.bases[min(number, len(each.bases) - 1)], method)
    for goal, each in goals.GOALS.items()
    for number, (domain, methods) in enumerate(each.methods.items())
    for method in methods
    if (domain, method) in registry.METHODS
]


@pytest.mark.parametrize(("goal", "base", "method"), GOAL_METHODS)
def test_every_goal_and_method_makes_a_job(place: Place, goal: str, base: str, method: str) -> None:
    name = place.new_set()
    job = teach.job_of(place, name, "", "Red Fox!", goal, base, "Quick look", method, '{"train.batch_size": 2}')
    loaded = Job.load(job)
    assert (loaded.method["name"], loaded.train.steps, loaded.train.batch_size) == (method, 100, 2)
    assert loaded.data["path"] == str(place.data / name)
    shown = tomllib.loads(loaded.to_toml())
    assert shown["method"].get("trigger", shown["method"].get("token", "red-fox")).strip("<>") == "red-fox"


def test_a_clone_has_the_settings_that_were_changed(place: Place) -> None:
    found = teach.cloned(place, "20260102-b")
    assert found["goal"] == "A subject"
    assert found["settings"] == {}  # rank 8 and 300 steps are what everyone has
    job = teach.job_of(place, "", "20260102-b", found["name"], found["goal"], found["base"], "Usual", found["method"],
                       '{"method.rank": 16}')  # fmt: skip
    assert (job["method"]["rank"], job["data"]["path"]) == (16, "photos")


@pytest.mark.parametrize("base", ["/etc", "../x", "~/model", "a\0b", "C:\\x", "x/../../y", "file:///etc", ""])
def test_a_browser_names_no_folder(place: Place, base: str) -> None:
    with pytest.raises(InputError, match="a browser names no folders"):
        teach.checked(place, place.new_set(), "", "fox", "A subject", base)


def test_forms_say_nothing_where_nothing_is_changed() -> None:
    for domain, method in registry.METHODS:
        for rows in forms.sections(domain, method).values() if domain in forms.DATA else ():
            for row in rows:
                if row["default"] != "required":
                    shown = forms.field(row, row["default"])
                    assert shown.info
                    assert forms.parsed(row, shown.value) is None, row


def test_what_fields_say_goes_into_a_job() -> None:
    said = {"train.steps": 6, "train.seed": 0, "method.rank": 4, "method.targets": "q, v"}
    assert forms.changed("diffusion", "lora", json.dumps(said)) == {
        "train": {"steps": 6},
        "method": {"rank": 4, "targets": ["q", "v"]},
    }


def test_a_browser_sends_more_than_fields_have(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of this machine, a setting of the machine, a section and a setting that there are not."""
    said = {
        "data.path": "/etc",
        "method.init": "/etc",
        "train.device": "cuda:7",
        "sample.every": 1,
        "x.y": 1,
        "steps": 2,
    }
    assert forms.changed("diffusion", "lora", json.dumps(said)) == {}
    name = place.new_set()
    job = teach.job_of(place, name, "", "Fox", "A subject", "pocket-sd", "Usual", "lora", json.dumps(said))
    assert job["data"]["path"] == str(place.data_set(name))
    for broken in ("", "[1]", "{", "7", '"x"'):
        with pytest.raises(InputError, match="the page sent no settings"):
            forms.changed("diffusion", "lora", broken)
    rows = [{"name": "sizes", "type": "tuple[int, ...]", "default": ()}]
    monkeypatch.setattr(forms, "sections", lambda *_: {"data": rows})
    assert forms.changed("vision", "lora", '{"data.sizes": "1, 2"}') == {"data": {"sizes": [1, 2]}}
    with pytest.raises(InputError, match=r"data.sizes = 'a b': it is no list of numbers"):
        forms.changed("vision", "lora", '{"data.sizes": "a b"}')


def test_fields_are_read_as_toml_has_them() -> None:
    def said(kind: str, default: object, value: object) -> object:
        return forms.parsed({"type": kind, "default": default}, value)

    assert said("float", 8.0, 4) == 4.0
    assert said("tuple[int, ...]", (), "1, 2") == [1, 2]
    assert said("str | tuple[str, ...]", "attention", "q, v") == ["q", "v"]
    assert said("str | tuple[str, ...]", "attention", "mlp") == "mlp"
    assert said("bool", False, True) is True
    assert said("int | None", None, None) is None


def test_deleting_can_be_undone(place: Place) -> None:
    with RunLock(place.run("20260101-a").folder), pytest.raises(InputError, match="being trained"):
        library.trash(place, "20260101-a")
    library.trash(place, "20260101-a")
    assert [run.id for run in place.newest()] == ["20260102-b"]
    library.restore(place)
    assert place.run("20260101-a").metrics()
    with pytest.raises(InputError, match="nothing was deleted"):
        library.restore(place)


def test_library_finds_by_tag_and_escapes(place: Place) -> None:
    library.set_tags(place.run("20260101-a"), "red, <u>, red")
    shown = library.listing(place, "RED lora", "")
    assert "&lt;b&gt;sks" in shown
    assert "&lt;u&gt;" in shown
    assert "Nothing fits" in library.listing(place, "blue", "")
    assert "&lt;b&gt;sks" in library.card(place.run("20260101-a"))


def test_comparison(place: Place) -> None:
    both = place.newest()
    assert compare.differences(both) == [{"setting": "method.rank", "20260102-b": "8", "20260101-a": "4"}]
    shown = compare.comparison(both)
    assert shown.count("<svg") == 2
    ballot, pair = compare.pair_of(both)
    assert set(pair) == {"20260101-a", "20260102-b"}
    assert not any(name in ballot for name in pair)  # blind
    link = compare.written(place, both)
    (file,) = (place.work / "exports").glob("*.html")
    assert file.name in link


def test_files_are_looked_up(place: Place) -> None:
    api = FastAPI()
    api.include_router(files.routes(place))
    client = TestClient(api)
    answer = client.get("/files/runs/20260101-a/samples/000010/a.png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    exports = place.work / "exports"
    exports.mkdir(parents=True)
    for name in ("x.html", "x.svg", ".env"):
        (exports / name).write_text("<script>")
    (exports / "link.txt").symlink_to("/etc/passwd")
    answer = client.get("/files/exports/x.svg")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    (place.run("20260101-a").folder / "samples" / "evil.png").symlink_to("/etc/passwd")
    for path in (
        "runs/20260101-a/job.toml", "runs/20260101-a/samples/../job.toml", "runs/20260101-a/samples/evil.png",
        "runs/..%2f20260101-a/samples/000010/a.png", "runs/none/x.png", "exports/.env", "exports/link.txt",
        "exports/..%2f..%2f20260101-a%2fjob.toml", "exports//etc/passwd", "data/../x.png", "data/x/y.png",
        "shown/..%2fexports%2fx.html", "shown/%2fetc%2fpasswd",
    ):  # fmt: skip
        assert client.get(f"/files/{path}").status_code == 404, path


def test_a_domain_brings_its_own_preview(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page asks the domain's package; a domain that nobody thought of needs no change of a page."""
    monkeypatch.setitem(sys.modules, "smells", types.SimpleNamespace(ASKS="pictures"))  # type: ignore[arg-type]
    monkeypatch.setitem(registry.DOMAINS, "smells", "smells")
    card = place.runs / "20260101-a" / "result" / "adapter.json"
    assert preview.kind_of(place, ["20260101-a"]) == "prompts"
    card.write_text(json.dumps(CARD | {"domain": "smells"}))
    assert preview.kind_of(place, ["20260101-a"]) == "pictures"
    cells = [{"row": "1.png", "column": "lora", "picture": "", "shares": {"<rose>": 0.75}, "text": ""}]
    assert "&lt;rose&gt;" in preview.table(place, cells)
    assert "75%" in preview.table(place, cells)


def test_addresses_that_only_this_machine_reaches() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "x")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


DUPLICATE = {"kind": "duplicate", "level": "warning", "remedy": "Remove all but one", "files": {"<2>.png": "the same"}}
TRAINED = Estimate("cpu", 10, 2.0, 0.5, 3.0, 0.0, 10**8, 2 * 10**8, 10**9, 3 * 10**6, 10**6, 1000)


def test_findings_and_estimates_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name = place.new_set()
    (place.data_set(name) / "1.png").write_bytes(b"x")
    form = [name, "", "", "A subject", "pocket-sd", "Usual", "lora", "{}"]
    assert teach.can_check(place, *form)
    assert not teach.can_check(place, *form[:4], "org/model", *form[5:]), "a base of a hub is not loaded unasked"
    assert not teach.can_check(place, place.new_set(), *form[1:]), "there are no pictures"
    job = teach.job_of(place, *form)
    monkeypatch.setattr(place.models, "ask", lambda what, job: {"findings": [DUPLICATE, DUPLICATE | {"files": {}}]})
    shown = check.findings(place, job)
    assert "<strong>duplicate</strong> (1). Remove all but one.<small>&lt;2&gt;.png: the same</small>" in shown
    assert "Nothing is wrong" in check.told_findings({"findings": []})

    assert check.known(place, job) is None
    document = json.dumps(TRAINED.document(job["train"], 50, 7))
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=document, returncode=0))
    assert "About 3 min, 200 MB of memory on cpu (1.0 GB there), 11 MB on disk" in check.estimate(place, job)
    monkeypatch.delattr(check.subprocess, "run")  # it is not measured again
    assert "About 3 min" in teach.expected(place, *form)
    assert "About 9 min" in teach.expected(place, *form[:5], "Thorough", *form[6:])
    assert "About" not in teach.expected(place, *form[:6], "dora", "{}")
    full = replace(TRAINED, peak=2 * 10**9)
    assert 'role="alert">The memory is too little: set a smaller batch_size' in check.told_estimate(place, job, full)


@pytest.mark.parametrize(
    ("stdout", "code", "told"),
    [
        ('{"error": {"message": "m", "given": "<base>", "reason": "none", "remedy": "r"}}', 2, "&lt;base&gt;: none. r"),
        ('{"error": {"message": "diverged"}}', 1, "diverged"),
        ("", -9, "for want of memory"),
        ("", 1, "exit code 1"),
    ],
)
def test_what_a_training_would_fail_of_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, stdout: str, code: int, told: str
) -> None:
    answer = types.SimpleNamespace(stdout=stdout, returncode=code)
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: answer)
    assert told in check.estimate(place, teach.job_of(place, "", "", "x", "A subject", "pocket-sd", "", "lora", "{}"))


def test_the_doctor_looks_at_pictures_of_every_goal(tmp_path: Path, sprite: Path) -> None:
    """A base of a hub is not loaded for it; of a classifier, captions are no matter."""
    folder = tmp_path / "set" / "disc"
    folder.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(sprite.read_bytes())
    common = {"data": {"path": str(tmp_path / "set")}, "base": "org/model"}
    found = {
        domain: [each["kind"] for each in worker.doctor(tmp_path, {**common, **rest})["findings"]]
        for domain, rest in {
            "diffusion": {"domain": "diffusion", "method": {"name": "lora"}},
            "vision": {"domain": "vision", "method": {"name": "linear"}},
        }.items()
    }
    assert found == {"diffusion": ["duplicate", "small", "no caption"], "vision": ["duplicate"]}


def test_adapters_are_merged_by_the_command(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(what: str, argv: list[str]) -> None:
        asked.append(argv)
        folder = Path(next(each for each in argv if "merged-" in each))
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "<b>.safetensors").write_bytes(b"x")

    monkeypatch.setattr(place.models, "ask", ask)
    runs_of = [str(place.runs / name) for name in ("20260101-a", "20260102-b")]
    shown = library.merged(place, "20260101-a", ["20260102-b", "20260101-a"], "0.7; 0.3".replace(";", ","))
    assert "One adapter for all" in shown and "unet/&lt;b&gt;.safetensors" in shown
    assert asked[-1][:4] == ["adapters", "merge", *runs_of] and asked[-1][-1] == "--weights=0.7,0.3"
    assert "The base with it" in library.merged(place, "20260101-a", None, "")
    assert asked[-1][:3] == ["adapters", "merge", runs_of[0]] and len(asked[-1]) == 4
    with pytest.raises(InputError, match="these are no numbers"):
        library.merged(place, "20260101-a", ["20260102-b"], "--base=/etc")
    with pytest.raises(InputError, match="there is no such run"):
        library.merged(place, "20260101-a", ["../x"], "")


@pytest.mark.alone
def test_the_worker_merges_what_it_trained(tmp_path: Path) -> None:
    """Two LoRAs of zero steps' worth become one adapter; the base takes one."""
    from graft.studio.training import train

    (tmp_path / "set").mkdir()
    for name, colour in (("1.png", "red"), ("2.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "set" / name)
    job = {"base": "pocket-sd", "method": {"name": "lora", "rank": 2}, "data": {"path": str(tmp_path / "set")},
           "train": {"steps": 1, "batch_size": 1}}  # fmt: skip
    made = [str(train(job, runs=tmp_path / "runs").folder) for _ in range(2)]
    worker.command(tmp_path / "runs", ["adapters", "merge", *made, str(tmp_path / "one"), "--weights=0.7,0.3"])
    assert (tmp_path / "one" / "adapter.safetensors").is_file()
    worker.command(tmp_path / "runs", ["adapters", "merge", made[0], str(tmp_path / "base")])
    assert (tmp_path / "base" / "model_index.json").is_file()
