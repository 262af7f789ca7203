"""One definition of a job for Python, TOML and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.studio.errors import InputError
from graft.studio.job import Job

TOML = """
base = "pocket-sd"
[method]
name = "lora"
rank = 4
[data]
path = "photos"
[train]
steps = 7
learning_rate = 1e-4
"""
MAPPING: dict[str, Any] = {
    "base": "pocket-sd",
    "method": {"name": "lora", "rank": 4},
    "data": {"path": "photos"},
    "train": {"steps": 7, "learning_rate": 1e-4},
}


def test_file_mapping_and_job_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    job = Job.load("job.toml")
    assert job == Job.load(MAPPING) == Job.load(job)
    assert (job.domain, job.train.steps, job.train.learning_rate) == ("diffusion", 7, 1e-4)


def test_paths_stay_where_they_were_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file they are relative to it, in a mapping and on the command line to the current folder."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    assert Job.load("jobs/job.toml").data["path"] == str(tmp_path / "jobs" / "photos")
    assert Job.load("jobs/job.toml", ["data.path=mine"]).data["path"] == str(tmp_path / "mine")
    job = Job.load(MAPPING)
    assert job.data["path"] == str(tmp_path / "photos")
    (tmp_path / "jobs" / "frozen.toml").write_text(job.to_toml())
    assert Job.load("jobs/frozen.toml") == job
    tasks = 'base = "pocket-llava"\n[method]\nname = "o_lora"\nearlier = ["one", "/two"]\n[data]\npath = "talks.json"\n'
    (tmp_path / "jobs" / "tasks.toml").write_text(tasks)
    assert list(Job.load("jobs/tasks.toml").method["earlier"]) == [str(tmp_path / "jobs" / "one"), "/two"]


def test_overrides_are_toml_or_words() -> None:
    job = Job.load(MAPPING, ["train.steps=9", "method.trigger=<sprout>", "name=mine", "sample.prompts=['a', 'b']"])
    assert (job.train.steps, job.method["trigger"], job.name, job.sample.prompts) == (9, "<sprout>", "mine", ("a", "b"))


def with_(path: str, value: Any) -> dict[str, Any]:
    section, key = path.split(".")
    return {**MAPPING, section: {**MAPPING.get(section, {}), key: value}}


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (with_("method.rnak", 4), "method.rnak: no such key. Did you mean 'rank'?"),
        (with_("train.step", 4), "train.step: no such key. Did you mean 'steps'?"),
        (with_("data.pth", "x"), "data.pth: no such key. Did you mean 'path'?"),
        ({**MAPPING, "bass": 1}, "job.bass: no such key. Did you mean 'base'?"),
        (with_("method.name", "loar"), "method 'loar': there is no such method. Did you mean 'lora'?"),
        ({**MAPPING, "domain": "difusion"}, "domain 'difusion': there is no such domain. Did you mean 'diffusion'?"),
        (with_("method.rank", -3), "rank -3: must be at least 1"),
        (with_("train.steps", 0), "train.steps = 0: expected 1 or more"),
        (with_("train.learning_rate", -1e-3), "train.learning_rate"),
        (with_("train.mixed_precision", "fp8"), "'auto', 'no', 'bf16' or 'fp16'"),
        ({**MAPPING, "method": {}}, "method.name: it is required"),
        ({key: value for key, value in MAPPING.items() if key != "base"}, "job.base: is required"),
        ({**MAPPING, "data": {}}, "data.path: is required"),
    ],
)
def test_what_is_wrong_is_named(job: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Job.load(job)
    assert message in str(caught.value)


@pytest.mark.parametrize("override", ["train.steps", "=3", "base.x=1"])
def test_overrides_that_are_none(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        Job.load(MAPPING, [override])
