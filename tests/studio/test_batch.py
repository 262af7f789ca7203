"""Batches: every bad row is named before anything starts; what is missing is trained, alike jobs together."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import graft
from graft.studio import registry
from graft.studio.batch import engines, prepare_batch, read_manifest, run_batch
from graft.studio.batch.manifest import Entry
from graft.studio.batch.summary import write_summary
from graft.studio.bench import line
from graft.studio.cli import main
from graft.studio.config import write_toml
from graft.studio.errors import InputError
from graft.studio.runs import Run, RunLock, holder
from graft.studio.runs.machine import machine_folder

TRAIN = {"steps": 6, "device": "cpu", "threads": 1, "mixed_precision": "no", "log_every": 2, "checkpoint_every": 2}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    line.register()
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRAFT_WORKER", "graft.studio.bench.line")
    monkeypatch.setenv("GRAFT_DEVICES", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(graft.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name / "1.png")
    yield
    del registry.DOMAINS["line"], registry.METHODS["line", "fit"]


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a TOML manifest of subjects, with two methods of the domain `line`."""

    def write(subjects: str, train: dict[str, Any] | None = None, pause: float = 0.0) -> Path:
        lines = ['base = "none"', 'domain = "line"', "[train]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in {**TRAIN, **(train or {})}.items()]
        lines += ['[[methods]]\nname = "fit"\nlabel = "narrow"', f"width = 4\npause = {pause}"]
        lines += [
            '[[methods]]\nname = "fit"\nlabel = "wide"\ntrain = {seed = 7}',
            f"width = 8\npause = {pause}",
            subjects,
        ]
        (tmp_path / "garden.toml").write_text("\n".join(lines))
        return tmp_path / "garden.toml"

    return write


def subjects(*names: str) -> str:
    return "\n".join(f'[[subjects]]\nname = "{name}"\ndata = "{name}"' for name in names)


def by_id(entries: list[Entry]) -> dict[str, Any]:
    return {entry.run_id("x"): entry.job for entry in entries}


def test_the_three_kinds_of_manifest_say_the_same(manifest: Callable[..., Path], tmp_path: Path) -> None:
    toml = manifest(subjects("a") + '\n[[subjects]]\nname = "B b"\ndata = "b"\nset = {"train.steps" = 9}')
    for label, width, seed in (("narrow", 4, 0), ("wide", 8, 7)):
        job = {"base": "none", "domain": "line", "name": label, "method": {"name": "fit", "width": width, "pause": 0.0}}
        text = write_toml({**job, "train": {**TRAIN, **({"seed": seed} if seed else {})}})
        (tmp_path / f"{label}.toml").write_text(text)
    (tmp_path / "g.csv").write_text('name,data,train.steps\na,a,\n"B b",b,9\n')
    rows = [{"name": "a", "data": "a"}, {"name": "B b", "data": {"path": "b"}, "set": {"train.steps": 9}}]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    jobs = [tmp_path / "narrow.toml", tmp_path / "wide.toml"]
    entries = read_manifest(toml)
    assert list(by_id(entries)) == ["x-a-narrow", "x-a-wide", "x-b-b-narrow", "x-b-b-wide"]
    for other in (read_manifest(tmp_path / "g.csv", jobs), read_manifest(tmp_path / "g.jsonl", jobs)):
        assert by_id(other) == by_id(entries)
    steps = {run: (job.train.steps, job.train.seed, job.data["path"]) for run, job in by_id(entries).items()}
    assert steps["x-b-b-wide"] == (9, 7, str(tmp_path / "b"))
    assert [entry.row for entry in read_manifest(tmp_path / "g.csv", jobs)] == [2, 2, 3, 3]


def test_every_bad_row_is_named_at_once_and_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.toml").write_text('base = "none"\ndomain = "line"\nmethod.name = "fit"\n')
    rows = "name,data,train.steps,method.wdth\na,a,5,\n,b,5,\nb,,5,\nc,c,-1,\na,b,5,\nd,c,5,3\n../e,c,5,\n"
    (tmp_path / "g.csv").write_text(rows)
    assert main(["batch", "g.csv", "--job", "job.toml"]) == 2
    told = capsys.readouterr().err
    assert "6 of 7 rows cannot be used" in told
    for part in (
        "row 3: name None: it is missing",
        "row 4: b: data: it is missing",
        "row 5: train.steps = -1: expected 1 or more",
        "row 6: name 'a': row 2 has it already",
        "row 7: method.wdth: no such key. Did you mean 'width'?",
        "row 8: name '../e'",
    ):
        assert part in told, told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.yaml", "", "a manifest is a .toml, .csv or .jsonl file"),
        ("m.csv", "name,folder\n", "no column 'data'"),
        ("m.csv", "name,data\n", "it has no rows"),
        ("m.csv", "name,data\na,b,c\n", "row 2: it has more cells than columns"),
        ("m.jsonl", '{"name": "a", "data": "a"}\n{"name": \n', "row 2: it is no JSON"),
        ("m.toml", "[[subject]]\n", "no such key. Did you mean 'subjects'"),
        ("m.csv", "name,data\na,a\n", "nothing says with which method"),
    ],
)
def test_what_is_no_manifest_is_told(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=reason):
        read_manifest(tmp_path / name)


def test_plans_put_alike_jobs_together_and_begin_nothing_twice(manifest: Callable[..., Path], tmp_path: Path) -> None:
    entries = read_manifest(manifest(subjects("a", "b", "c", "gone")))
    batch = prepare_batch(entries, "g", tmp_path / "runs", workers=2, together=2)
    groups = {tuple(run.state["queue"]["together"]) for run in batch.runs if run.status == "queued"}
    assert groups == {("g-a-narrow",), ("g-b-narrow", "g-c-narrow"), ("g-a-wide",), ("g-b-wide", "g-c-wide")}
    lost = [run for run in batch.runs if run.status == "failed"]
    assert [run.id for run in lost] == ["g-gone-narrow", "g-gone-wide"]
    assert lost[0].state["message"].startswith(f"{tmp_path / 'gone'}: no such file or folder")
    assert batch.runs[0].state["queue"]["share"] == 0.5
    for run in batch.runs[:2]:
        run.write_state(status="finished")
    (tmp_path / "gone").mkdir()
    again = prepare_batch(entries, "g", tmp_path / "runs")
    assert [run.id for run in again.missing] == [run.id for run in batch.runs[2:]]
    assert again.runs[-1].status == "queued"
    changed = read_manifest(manifest(subjects("a", "b", "c", "gone"), {"steps": 7}))
    with pytest.raises(InputError, match=r"row 1 \(a, narrow\): its run .* from another job: train was .*--name"):
        prepare_batch(changed, "g", tmp_path / "runs")


def test_summary_and_sheet(manifest: Callable[..., Path], tmp_path: Path) -> None:
    batch = prepare_batch(read_manifest(manifest(subjects("a", "gone"))), "g", tmp_path / "runs")
    done = batch.runs[0]
    (done.folder / "result").mkdir()
    Image.new("RGB", (64, 64), "orange").save(done.folder / "result" / "preview.png")
    done.write_state(status="finished")
    document = write_summary(batch)
    assert document["counts"] == {"finished": 1, "queued": 1, "failed": 2}
    with (tmp_path / "runs" / "g.batch" / "summary.csv").open() as file:
        found = [(row["row"], row["subject"], row["method"], row["status"]) for row in csv.DictReader(file)]
    assert found[0] == ("1", "a", "narrow", "finished")
    assert found[3] == ("2", "gone", "wide", "failed")
    assert json.loads((tmp_path / "runs" / "g.batch" / "summary.json").read_text()) == document
    with Image.open(tmp_path / "runs" / "g.batch" / "sheet.png") as sheet:
        assert sheet.size == (3 * 144, 2 * 166)
        assert sheet.getpixel((72, 72)) == (0, 128, 128), "the subject's own picture"
        assert sheet.getpixel((144 + 72, 72)) == (255, 165, 0), "what the method made of it"


def test_a_copy_of_a_base_for_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    class Base:
        hash = "1"

    def load(name: str, device: str | None, attention: str) -> Base:
        loads.append(name)
        return Base()

    assert registry.kept(load, "x", "cpu", "auto") is not registry.kept(load, "x", "cpu", "auto")
    assert loads == ["x", "x"]
    monkeypatch.setattr(registry, "_kept", None)
    registry.keep_bases()
    first, second = registry.kept(load, "x", "cpu", "auto"), registry.kept(load, "x", "cpu", "auto")
    assert first is not second
    assert loads == ["x"] * 3


def test_a_parcel_holds_what_a_run_needs_and_nothing_of_this_machine(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    batch = prepare_batch(read_manifest(manifest(subjects("a"))), "g", tmp_path / "runs", engine="ray")
    parcel = engines.pack(batch.runs[:1])
    assert set(parcel) == {"data/0/a/1.png", *(f"g-a-narrow/{n}" for n in ("job.toml", "state.json", "events.jsonl"))}
    assert 'path = "../data/0/a"' in parcel["g-a-narrow/job.toml"].decode()
    with RunLock(batch.runs[0].folder):
        assert engines._groups(batch)[0][0] == batch.runs[0]


@pytest.mark.alone
def test_failures_stay_alone_and_a_restart_trains_what_is_missing(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed in the middle; a folder that vanishes after the plan makes its whole group look wrong at first."""
    path = manifest(subjects("a", "b", "c", "gone"), {"steps": 40}, pause=0.02)
    entries = read_manifest(path)
    batch = prepare_batch(entries, "g", tmp_path / "runs")
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b").rmdir()

    class Killed(Exception):
        pass

    def kill(shown: Any) -> None:
        running = [run for run in shown.runs if run.status == "running" and run.state["step"] > 4]
        if running:
            os.kill(holder(machine_folder()) or 0, signal.SIGKILL)
            os.kill(holder(running[0].folder) or 0, signal.SIGKILL)
            raise Killed

    with pytest.raises(Killed):
        run_batch(batch, "local", 1, kill)
    time.sleep(0.2)
    interrupted = [run.id for run in batch.runs if run.status == "interrupted"]
    assert interrupted == ["g-a-narrow", "g-c-narrow"]
    assert main(["batch", str(path), "--name", "g", "--json"]) == 1
    runs = {run.id: run for run in batch.runs}
    status = {name: run.status for name, run in runs.items()}
    assert [name for name, word in status.items() if word == "failed"] == [
        "g-b-narrow", "g-b-wide", "g-gone-narrow", "g-gone-wide",
    ]  # fmt: skip
    assert sum(word == "finished" for word in status.values()) == 4
    assert [run.state["attempt"] for run in runs.values() if run.status == "finished"] == [2, 1, 2, 1]
    assert runs["g-a-narrow"].group == [runs["g-a-narrow"], runs["g-c-narrow"]]
    (tmp_path / "b").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "1.png")
    (tmp_path / "gone").mkdir()
    assert main(["batch", str(path), "--name", "g", "--json"]) == 0
    assert [Run(run.folder).state["attempt"] for run in batch.runs] == [2, 1, 1, 1, 2, 1, 1, 1]
    logs = "".join((run.folder / "log.txt").read_text() for run in batch.runs if (run.folder / "log.txt").exists())
    assert logs.count("base none loaded") == 3, "once in each worker: before the kill, after it, and the last time"
