"""The queue as its clients see it: runs that wait in their folders for the machine's scheduler.

All that the queue knows of a run stands in the run's own `state.json`, below `queue`; whoever changes it holds the
run's lock. Nothing can be lost that is not a run folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.studio.config import from_dict, read_toml
from graft.studio.errors import RunError
from graft.studio.job import Job, TrainConfig
from graft.studio.runs.folder import Run, create_run, new_folder
from graft.studio.runs.index import Index
from graft.studio.runs.lock import RunLock
from graft.studio.runs.machine import announce, ensure_scheduler

FINAL = ("finished", "failed", "stopped", "created", "interrupted")
"""Statuses of runs for which nobody does anything, unless the queue will."""


def submit(
    job: Job | Mapping[str, Any] | str | Path,
    runs: str | Path | None = None,
    priority: int = 0,
    first: bool = False,
) -> Run:
    """Put a job into the queue of this machine and return its run, which waits.

    The machine's scheduler, started if there is none, trains it when a device is free. Neither needs the caller.

    Args:
        job: a `Job`, a mapping, or the path of a TOML file.
        runs: folder of the runs; None is `runs` in the current folder.
        priority: higher ones go first; of equal ones, the one that came first.
        first: before all that wait with this priority.

    Raises:
        InputError: anything wrong with the job; nothing has been written then.
    """
    job = Job.load(job)
    folder = new_folder(job, runs=runs)
    run = create_run(job, folder, queue=place(job.train, priority, _front(folder.parent) if first else None))
    announce(folder.parent)
    return run


def place(train: TrainConfig, priority: int = 0, order: float | None = None, **more: Any) -> dict[str, Any]:
    """What a scheduler needs to know of a run: `priority`, then `order`; `device` and `processes`; the folder to be in.

    `together`: the runs that it may share its batch with; `batch`, `limit`, `share`: the subjects that it belongs to,
    how many of their processes may run at once, and on which part of a device each; `engine`: who starts it, if not the
    machine's scheduler.
    """
    return {
        "priority": priority,
        "order": time.time() if order is None else order,
        "device": train.device or "",
        "processes": train.processes,
        "submitted": time.time(),
        "cwd": str(Path.cwd()),
        **more,
    }


def requeue(run: Run, priority: int | None = None, first: bool = False) -> Run:
    """Put a run that is not finished back into the queue; it goes on from its newest checkpoint.

    Raises:
        RunError: it is finished, or a program trains it now.
    """
    if run.status == "finished":
        raise RunError(str(run.folder), "it is finished", "Clone it to train once more: graft runs clone RUN")
    with RunLock(run.folder):
        run.take_request("stop")
        old = run.state.get("queue") or {}
        train = from_dict(TrainConfig, read_toml(run.folder / "job.toml").get("train", {}), "train")
        new = place(train, int(old.get("priority", 0)) if priority is None else priority)
        if first:
            new["order"] = _front(run.folder.parent)
        run.write_state(
            status="queued", message="", failure="", queue={"together": [run.id], **old, **new, "not_before": 0}
        )
        run.write_event("queued")
    announce(run.folder.parent)
    return run


def move(run: Run, priority: int | None = None, first: bool = False, last: bool = False) -> Run:
    """Change a waiting run's priority, or its place among those of the same priority.

    Raises:
        RunError: it does not wait.
    """
    changes: dict[str, Any] = {} if priority is None else {"priority": priority}
    if first or last:
        changes["order"] = _front(run.folder.parent) if first else time.time()
    _put(run, **changes)
    announce(run.folder.parent)
    return run


def shift(run: Run, places: int) -> Run:
    """Move a waiting run some places back in the line, or ahead if the number is negative; at the end it stays there.

    Where it passes a run of another priority, it takes that one's.

    Raises:
        RunError: it does not wait.
    """
    _put(run)  # refuses one that does not wait
    line = _line(run.folder.parent)
    here = next(place for place, row in enumerate(line) if row["id"] == run.id)
    own, others = line[here]["queue"], [*line[:here], *line[here + 1 :]]
    there = max(0, min(here + places, len(others)))
    if there == here:
        return run
    passed = others[there if places < 0 else there - 1]["queue"]["priority"]
    priority = max(own["priority"], passed) if places < 0 else min(own["priority"], passed)
    before = [row["queue"]["order"] for row in others[:there] if row["queue"]["priority"] == priority]
    after = [row["queue"]["order"] for row in others[there:] if row["queue"]["priority"] == priority]
    low = before[-1] if before else after[0] - 2.0
    high = after[0] if after else before[-1] + 2.0
    order = (low + high) / 2
    if not low < order < high:  # they came at the same moment: no number lies between them
        same = [row for row in line if row["queue"]["priority"] == priority]
        for place, row in enumerate(same):
            with suppress(RunError):  # it has just begun
                _put(Run(run.folder.parent / row["id"]), order=low + place)
        return shift(run, places)
    _put(run, priority=priority, order=order)
    announce(run.folder.parent)
    return run


def _put(run: Run, **changes: Any) -> None:
    """Change what the queue knows of a run that waits.

    Raises:
        RunError: it does not.
    """
    with RunLock(run.folder):
        state = run.state
        if state["status"] != "queued":
            raise RunError(str(run.folder), f"it is {run.status}, not queued", "Only a run that waits has a place")
        run.write_state(queue={**state["queue"], **changes})


def cancel(run: Run) -> bool:
    """Take a waiting run out of the queue; return False if it does not wait (any more)."""
    try:
        with RunLock(run.folder):
            if run.state["status"] != "queued":
                return False
            run.write_state(status="stopped", message="taken out of the queue")
            run.write_event("stopped", message="taken out of the queue")
            return True
    except RunError:
        return False  # its training has just begun


def waiting(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those rows of an index that wait, the next one first."""
    found = [row for row in rows if row["status"] == "queued"]
    return sorted(found, key=lambda row: (-row["queue"]["priority"], row["queue"]["order"], row["id"]))


def is_over(state: Mapping[str, Any]) -> bool:
    """Tell whether a run's state is final: nobody trains it, and the scheduler will not try it again."""
    return state["status"] in FINAL and not will_retry(state)


def will_retry(state: Mapping[str, Any]) -> bool:
    """Tell whether the scheduler will put a run back into the queue by itself."""
    if not state.get("queue") or state["queue"].get("engine"):
        return False
    return state["status"] == "interrupted" or (state["status"] == "failed" and state.get("failure") == "transient")


def wait(runs: Sequence[Run], seconds: float | None = None) -> Sequence[Run]:
    """Return when the queue is done with these runs, or after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        if all(is_over({**run.state, "status": run.status}) for run in runs):
            break
        ensure_scheduler()  # the one before may have been killed
        time.sleep(0.2)
    return runs


def smaller(job: Job) -> Job:
    """Return the job with half the rows in a batch, accumulated twice as often: the same step in less memory.

    Raises:
        RunError: a batch has one row already.
    """
    train = job.train
    if train.batch_size == 1:
        remedy = "Set data.resolution, or a smaller method"
        raise RunError(f"job {job.name or job.method['name']}", "its batches have one row already", remedy)
    size = (train.batch_size + 1) // 2
    more = -(-train.batch_size * train.gradient_accumulation // size)
    return replace(job, train=replace(train, batch_size=size, gradient_accumulation=more))


def _line(runs: Path) -> list[Mapping[str, Any]]:
    index = Index(runs)
    index.refresh()
    return waiting(index.rows(["queued"]))


def _front(runs: Path) -> float:
    return min([row["queue"]["order"] for row in _line(runs)], default=time.time()) - 1.0
