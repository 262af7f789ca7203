"""From entries to runs: what is there already stays, what is missing is put into the queue, alike jobs together."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.studio import registry
from graft.studio.batch.manifest import Entry, slug
from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.studio.job import Job, TrainConfig
from graft.studio.runs.folder import Run, create_run
from graft.studio.runs.lock import RunLock
from graft.studio.runs.machine import devices
from graft.studio.runs.queue import place

TOGETHER = 16
"""Most jobs in one batch."""


@dataclass(frozen=True)
class Batch:
    """Entries and their runs."""

    name: str
    """The first part of each run's id."""
    entries: tuple[Entry, ...]
    """As in the manifest."""
    runs: tuple[Run, ...]
    """One for each."""
    missing: tuple[Run, ...]
    """Those that were put into the queue now."""

    @property
    def folder(self) -> Path:
        """Where its summary goes."""
        return self.runs[0].folder.parent / f"{slug(self.name)}.batch"


def prepare_batch(
    entries: Sequence[Entry],
    name: str,
    runs: str | Path = "runs",
    workers: int = 1,
    together: int = TOGETHER,
    engine: str = "local",
) -> Batch:
    """Make the runs that are missing, and put all that are not finished into the queue of an engine.

    Args:
        entries: of `read_manifest`.
        name: of the batch.
        runs: folder of the runs.
        workers: processes that train at once.
        together: most jobs that share a batch.
        engine: who starts the runs: "local" is this machine's scheduler.

    Raises:
        InputError: a run is there, but is not of this job; nothing has been written then.
    """
    root = Path(runs).absolute()
    made = [Run(root / entry.run_id(name)) for entry in entries]
    ids = [run.id for run in made]
    for entry, run in zip(entries, made, strict=True):
        if ids.count(run.id) > 1:
            remedy = 'Give each a label = "..."'
            raise InputError(f"row {entry.row}", f"two methods of it have the name {entry.method!r}", remedy)
        if (run.folder / "job.toml").exists():
            _check_same(entry, run)
    due = [k for k, run in enumerate(made) if not run.folder.exists() or run.status not in ("finished", "running")]
    places = {"batch": slug(name), "limit": workers, "share": _share(workers)}
    places |= {"engine": engine} if engine != "local" else {}
    for chunk in _chunks(due, entries, made, workers, together):
        for k in chunk:
            _put(entries[k].job, made[k], {**places, "together": [made[other].id for other in chunk]})
    return Batch(name, tuple(entries), tuple(made), tuple(made[k] for k in due))


def _put(job: Job, run: Run, places: dict[str, Any]) -> None:
    """Put a run into the queue; one whose data are not there fails at once."""
    queue = place(job.train, **places)
    path = job.data.get("path")
    lost = f"{path}: no such file or folder. Correct the row, then start the batch again" if _lost(path) else ""
    if not run.folder.exists():
        create_run(job, run.folder, queue=queue)
        if not lost:
            return
    if lost and run.state["message"] == lost:
        return  # it was told before
    with RunLock(run.folder):
        run.take_request("stop")
        if run.state.get("attempt", 0):
            queue["together"] = run.state.get("queue", {}).get("together", [run.id])
        failed = {"status": "failed", "message": lost, "failure": "input"}
        run.write_state(**(failed if lost else {"status": "queued", "message": "", "failure": ""}), queue=queue)
        run.write_event("failed" if lost else "queued", message=lost)


def _lost(path: Any) -> bool:
    return isinstance(path, str) and bool(path) and not Path(path).exists()


def _share(workers: int) -> float:
    """The part of a device that a worker gets: more workers than devices share them."""
    names = devices()
    count = len([name for name in names if name != "cpu"]) or len(names)
    return min(1.0, count / workers)


def _check_same(entry: Entry, run: Run) -> None:
    there, now = to_dict(run.job), to_dict(entry.job)
    if now["train"]["mixed_precision"] == "auto":
        now["train"]["mixed_precision"] = there["train"]["mixed_precision"]  # settled when it began
    for section in now:
        if there[section] != now[section]:
            reason = f"its run {run.folder} was made from another job: {section} was {there[section]}"
            remedy = "Give the batch another --name, or remove that run"
            raise InputError(f"row {entry.row} ({entry.subject}, {entry.method})", reason, remedy)


def _chunks(
    due: Sequence[int], entries: Sequence[Entry], runs: Sequence[Run], workers: int, together: int
) -> Iterator[list[int]]:
    """What is due, in groups that may share a batch, small enough that every worker has something to do."""
    alike: dict[str, list[int]] = defaultdict(list)
    for k in due:
        begun = runs[k].folder.exists() and runs[k].state.get("attempt", 0)
        fresh = not begun and not _lost(entries[k].job.data.get("path"))
        alike[_kind(entries[k].job) if fresh else f"alone {k}"].append(k)
    size = max(1, min(together, -(-len(due) // workers))) if due else 1
    for group in alike.values():
        count = -(-len(group) // size)
        edges = [len(group) * part // count for part in range(count + 1)]
        yield from (group[a:b] for a, b in zip(edges, edges[1:], strict=False))


def _kind(job: Job) -> str:
    """What jobs must have in common to share a batch; the domain has the last word when they start."""
    method = registry.method_class(job.domain, str(job.method["name"]))
    own = getattr(method, "own", ())
    train = {key: value for key, value in to_dict(job.train).items() if key not in TrainConfig.own}
    kind = [job.base, job.domain, job.data.get("resolution"), job.sample.every, train]
    kind += [{key: value for key, value in job.method.items() if key not in own}]
    alone = job.train.processes > 1 or not hasattr(registry.domain(job.domain), "prepare_together")
    return json.dumps([*kind, job.name if alone else ""], sort_keys=True, default=str)


def run_batch(batch: Batch, engine: str, workers: int, show: Callable[[Batch], None]) -> None:
    """Train what a batch lacks, with an engine, showing it now and then.

    Raises:
        InputError: the engine is not installed.
    """
    from graft.studio.batch import engines

    engines.ENGINES[engine](batch, workers, show)
