"""The benchmark on small sets and a small base: every row is there, and its checks say what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.studio.errors import RunError
from graft.studio.job import Job
from graft.studio.labelled import built_in as datasets
from graft.studio.registry import BENCHMARKS, find
from graft.vision import bench
from graft.vision.bench import METHODS, run, saved_bytes
from graft.vision.jobs import prepare


@pytest.fixture(autouse=True)
def small_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "TRAIN", 60)
    monkeypatch.setattr(datasets, "TEST", 30)
    datasets._drawn.cache_clear()
    yield
    datasets._drawn.cache_clear()


def test_rows_checks_and_files(folder: Path, tmp_path: Path):
    assert find(BENCHMARKS["vision"]) is run
    settings = {"base": str(folder), "tasks": ["pocket-count"], "methods": ["linear", "ssf"], "seeds": 2, "steps": 2}
    result = run(tmp_path, batch_size=4, shots=4, **settings)
    assert [(row["set"], row["method"]) for row in result["summary"]] == [
        ("pocket-count", "linear"), ("pocket-count", "ssf"),
    ]  # fmt: skip
    (check,) = result["checks"].values()
    accuracies = {row["method"]: row["accuracy"] for row in result["summary"]}
    each = [row["accuracy"] for row in result["rows"] if row["method"] == "ssf"]
    assert len(each) == 2 and accuracies["ssf"] == sum(each) / 2
    assert (check["value"], check["limit"]) == (accuracies["ssf"], accuracies["linear"])
    assert check["ok"] == (accuracies["ssf"] > accuracies["linear"]) == result["passed"]
    assert json.loads((tmp_path / "vision.json").read_text()) == result
    assert len(list((tmp_path / "runs").rglob("split.jsonl"))) == 4
    assert result["summary"][0]["parameters"] == 0 and "ssf" in result["table"]


def test_it_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings: dict[str, Any] = {
        "base": str(folder),
        "tasks": ["pocket-count"],
        "methods": ["ssf"],
        "batch_size": 4,
        "shots": 4,
    }
    first = run(tmp_path, seeds=1, steps=2, **settings)["rows"]
    trained = tmp_path / "runs" / "pocket-count" / "ssf" / "1"
    with monkeypatch.context() as broken:  # killed between the training and its figures
        broken.setattr(bench, "evaluate", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            run(tmp_path, seeds=2, steps=2, **settings)
    assert json.loads((tmp_path / "vision.json").read_text())["rows"] == first
    written = (trained / "result" / "adapter.safetensors").stat().st_mtime_ns
    rows = run(tmp_path, seeds=2, steps=2, **settings)["rows"]
    assert rows[:1] == first and [row["seed"] for row in rows] == [0, 1]
    assert (trained / "result" / "adapter.safetensors").stat().st_mtime_ns == written
    with pytest.raises(RunError, match="it is not an empty folder"):
        run(tmp_path, seeds=1, steps=3, **settings)


def test_every_method_of_the_table_is_one_of_the_registry():
    for section in METHODS.values():
        Job.load({"base": "pocket-vit", "domain": "vision", "method": section, "data": {"dataset": "pocket-count"}})


def test_saved_bytes_of_a_linear_probe_are_its_features(folder: Path):
    job = {"base": str(folder), "method": {"name": "linear"}, "data": {"dataset": "pocket-count"}}
    task = prepare(Job.load({**job, "train": {"device": "cpu", "batch_size": 8}}))
    batch = task.batch(0, torch.Generator().manual_seed(0))
    kept = saved_bytes(lambda: task(batch)[0], task)
    assert 8 * 32 * 4 <= kept < 8 * 32 * 4 + 8 * 3 * 4 * 4 + 8 * 8 * 4
