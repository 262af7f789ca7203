"""Run folders: made whole, locked by one process, read by any, checkpoints whole or not read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.studio.disk import append_line
from graft.studio.errors import DiskFullError, FormatError, RunError
from graft.studio.job import Job
from graft.studio.runs import Run, RunLock, create_run, find_run, holder, list_runs, open_run
from graft.studio.runs.checkpoints import Checkpoint, latest_checkpoint, read_checkpoint, write_checkpoint
from graft.studio.runs.folder import new_folder
from graft.studio.runs.stop import stop_run

HOLD = """
import sys, time
from graft.studio.runs import Run, RunLock
run = Run(__import__("pathlib").Path(sys.argv[1]))
{before}
with RunLock(run.folder):
    run.write_state(status="running")
    print("held", flush=True)
    {inside}
"""


@pytest.fixture
def run(make_job: Callable[..., dict[str, Any]], tmp_path: Path) -> Run:
    job = Job.load(make_job())
    return create_run(job, new_folder(job, runs=tmp_path / "runs"))


@contextmanager
def held(run: Run, inside: str = "time.sleep(60)", before: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    code = HOLD.format(inside=inside, before=before)
    with subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def checkpoint(step: int, value: float = 0.0) -> Checkpoint:
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.full((2,), value), "note": 1.5}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]
    return Checkpoint(
        step, {"w": torch.full((2,), value)}, {"state": {0: moments}, "param_groups": groups}, {"a": None}
    )


def test_a_new_run_holds_everything_it_was_started_from(run: Run) -> None:
    assert run.status == "created"
    assert run.job.method == {"name": "regression"}
    assert json.loads((run.folder / "env.json").read_text())["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert {p.name for p in run.folder.iterdir()} == {
        "job.toml", "env.json", "state.json", "samples", "checkpoints", "control",
    }  # fmt: skip
    assert list_runs(run.folder.parent) == [run]


def test_ids_begin_with_the_time_and_never_repeat(make_job: Callable[..., dict[str, Any]]) -> None:
    job = Job.load({**make_job(), "name": "Ein Schöner Name!"})
    ids = {new_folder(job).name for _ in range(50)}
    assert len(ids) > 40
    assert all(name.endswith("-ein-sch-ner-name") and name[:8].isdigit() for name in ids)


def test_a_folder_with_something_in_it_is_refused(run: Run) -> None:
    with pytest.raises(RunError, match="not an empty folder.*graft runs resume"):
        new_folder(run.job, run.folder)


@pytest.mark.parametrize("size", [10, 300])
def test_no_space_for_a_run_leaves_nothing(
    run: Run, tmp_path: Path, files_limited_to: Callable[[int], AbstractContextManager[None]], size: int
) -> None:
    with files_limited_to(size), pytest.raises(DiskFullError):
        create_run(run.job, tmp_path / "new" / "run")
    assert not list((tmp_path / "new").iterdir())


def test_runs_are_found_by_folder_id_and_ends(run: Run) -> None:
    root = run.folder.parent
    for name in (str(run.folder), run.id, run.id[:12], run.id[-12:]):
        assert find_run(name, root) == run or find_run(name, root).folder.samefile(run.folder)
    with pytest.raises(RunError, match=f"no such run.*Did you mean '{run.id}'"):
        find_run(run.id[:-1] + "X", root)
    with pytest.raises(RunError, match="no job.toml"):
        open_run(root)


def test_the_lock_of_another_process_is_seen_and_ends_with_it(run: Run) -> None:
    run.write_state(status="running")
    assert run.status == "interrupted"
    with held(run) as process:
        assert run.status == "running"
        assert holder(run.folder) == process.pid
        with pytest.raises(RunError, match=f"process {process.pid} is training this run"), RunLock(run.folder):
            pass
        process.kill()
        process.wait()
        assert run.status == "interrupted"
        with RunLock(run.folder):
            assert run.status == "running"
    assert holder(run.folder) is None


def test_looking_at_its_own_lock_does_not_lose_it(run: Run) -> None:
    """Closing any descriptor of the file would free a POSIX lock."""
    with RunLock(run.folder):
        assert holder(run.folder) == os.getpid()
        code = "import sys; from graft.studio.runs import holder; print(holder(sys.argv[1]))"
        seen = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True, check=True)
        assert seen.stdout.strip() == str(os.getpid())
        with pytest.raises(RunError, match="is training"), RunLock(run.folder):
            pass


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(run: Run) -> None:
    forks = "import os\n    if os.fork() == 0: time.sleep(5); os._exit(0)\n    print('x', flush=True); time.sleep(60)"
    with held(run, forks) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        assert holder(run.folder) is None


def test_readers_never_keep_a_starter_out(run: Run) -> None:
    stop = threading.Event()
    code = "import sys\nfrom graft.studio.runs import holder\nwhile True: holder(sys.argv[1])"
    with RunLock(run.folder):  # makes the file
        pass
    with subprocess.Popen([sys.executable, "-c", code, str(run.folder)]) as reader:
        try:
            for _ in range(30):
                with RunLock(run.folder):
                    stop.wait(0.005)
        finally:
            reader.kill()


def test_requests_are_taken_once(run: Run) -> None:
    assert not run.take_request("stop")
    run.request("stop")
    assert run.take_request("stop")
    assert not run.take_request("stop")


@pytest.mark.parametrize(
    ("obeys", "status"),
    [
        ("while not run.take_request('stop'): time.sleep(0.01)\n    run.write_state(status='stopped')", "stopped"),
        ("import signal\n    signal.pause()", "interrupted"),
        ("import signal\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(60)", "interrupted"),
    ],
    ids=["asked", "terminated", "killed"],
)
def test_the_stop_ladder(run: Run, obeys: str, status: str) -> None:
    with held(run, obeys) as process:
        assert stop_run(run, ask=0.5, terminate=0.5) == status
        assert process.wait(5) == {"stopped": 0}.get(status, process.returncode)
        assert not run.take_request("stop"), "the next attempt would stop at once"


def test_metrics_keep_the_last_attempt_at_each_step(run: Run) -> None:
    for attempt, step in ((1, 2), (1, 4), (1, 6), (2, 4), (2, 8)):
        append_line(run.folder / "metrics.jsonl", {"step": step, "attempt": attempt})
    assert [(row["step"], row["attempt"]) for row in run.metrics()] == [(2, 1), (4, 2), (6, 1), (8, 2)]


def test_checkpoint_round_trip(run: Run) -> None:
    folder = run.folder / "checkpoints"
    write_checkpoint(folder, checkpoint(3, 1.25), keep=2)
    found = latest_checkpoint(folder)
    assert found is not None
    assert (found.step, found.extra) == (3, {"a": None})
    assert found.model["w"].tolist() == [1.25, 1.25]
    assert found.optimizer["param_groups"] == [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]
    state = found.optimizer["state"][0]
    assert (state["step"].item(), state["exp_avg"].tolist(), state["note"]) == (3.0, [1.25, 1.25], 1.5)


def test_only_the_newest_are_kept(run: Run) -> None:
    folder = run.folder / "checkpoints"
    for step in (1, 2, 3, 4):
        write_checkpoint(folder, checkpoint(step), keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["00000003", "00000004", "LATEST"]
    assert (folder / "LATEST").read_text() == "00000004"


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no manifest", "no name"])
def test_a_damaged_checkpoint_is_never_read(run: Run, damage: str) -> None:
    folder = run.folder / "checkpoints"
    write_checkpoint(folder, checkpoint(1, 1.0), keep=3)
    path = write_checkpoint(folder, checkpoint(2, 2.0), keep=3)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    else:
        path.rename(folder / ".00000002-12345")
    if path.exists():
        with pytest.raises(FormatError):
            read_checkpoint(path)
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.step == 1
    assert found.model["w"].tolist() == [1.0, 1.0]


def test_nothing_is_pickled(run: Run) -> None:
    write_checkpoint(run.folder / "checkpoints", checkpoint(1), keep=1)
    kinds = {path.suffix for path in run.folder.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".toml", ""}
