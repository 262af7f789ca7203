"""Figures in other places: the same as in metrics.jsonl; libraries are imported only when they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking  # noqa: F401 (it looks for these libraries, before they are replaced here)
import pytest

from graft.studio.errors import InputError
from graft.studio.training import train, train_many

Make = Callable[..., dict[str, Any]]


class Recorder(ModuleType):
    """A library with wandb's interface."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[Any] = []

    def init(self, **settings: Any) -> Recorder:
        self.calls.append(("init", settings))
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.calls.append((step, figures))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_each_run_tells_its_own_figures(
    make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    library = Recorder(name)
    monkeypatch.setitem(sys.modules, name, library)
    jobs = [make_job(track=[name], seed=seed, steps=4) for seed in (1, 2)]
    runs = train_many(jobs, tmp_path / "runs")
    begun = [call[1] for call in library.calls if call[0] == "init"]
    assert [each["name"] for each in begun] == [run.id for run in runs]
    assert begun[0]["config"]["train"]["seed"] == 1
    assert not {"data", "sample"} & set(begun[0]["config"])
    assert library.calls.count("finish") == 2
    told = [call for call in library.calls if isinstance(call[0], int)]
    kept = [(row["step"], row["loss"]) for step in (0, 1) for row in (run.metrics()[step] for run in runs)]
    assert [(step, figures["loss"]) for step, figures in told] == kept


def test_tensorboard_events_go_into_the_run(make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None):
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            seen.append("closed")

    library = ModuleType("torch.utils.tensorboard")
    library.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    run = train(make_job(track=["tensorboard"], steps=2), runs=tmp_path / "runs")
    assert seen[0] == (str(run.folder / "tensorboard"), None)
    assert ("loss", run.metrics()[0]["loss"], 2) in seen
    assert seen[-1] == "closed"


def test_a_library_that_is_missing_is_told_before_anything_is_written(
    make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"'trackio' is not installed. Run: pip install trackio, or leave it out"):
        train(make_job(track=["trackio"]), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match=r"train.track.0"):
        train(make_job(track=["mlflow"]), runs=tmp_path / "runs")
