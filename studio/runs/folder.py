"""A run folder and how it is read.

    job.toml       the job, frozen          samples/        pictures drawn on the way
    env.json       versions, machine        checkpoints/    STEP/ folders, LATEST names one
    state.json     where it is              control/        requests: stop, save-now, sample-now
    events.jsonl   what happened            lock            held by the program that trains
    metrics.jsonl  figures by step          result/         the adapter
    log.txt        what it printed

A run whose state says running but whose lock is free was interrupted: no daemon is needed to find out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.errors import RunError
from graft.studio.formats.files import write_atomic
from graft.studio.job import Job
from graft.studio.runs.lock import holder

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

LIBRARIES = ("graft-studio", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Run:
    """One training on disk; every property reads the folder as it is now."""

    folder: Path
    """Where it is; the folder's name is the run's id."""

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def job(self) -> Job:
        """The job as it was started."""
        return Job.load(self.folder / "job.toml")

    @property
    def state(self) -> dict[str, Any]:
        """`status`, `step`, `steps`, `attempt`, `message`."""
        path = self.folder / "state.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"status": "created", "step": 0}

    @property
    def status(self) -> str:
        """created, running, stopped, failed, finished or interrupted."""
        status = str(self.state["status"])
        return "interrupted" if status == "running" and holder(self.folder) is None else status

    def metrics(self) -> list[dict[str, Any]]:
        """Logged figures by step; where a step was trained twice, after a resume, the later line counts."""
        rows = {row["step"]: row for row in _lines(self.folder / "metrics.jsonl") if "step" in row}
        return [rows[step] for step in sorted(rows)]

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order: started, checkpoint, sample, stopped, failed, finished."""
        return list(_lines(self.folder / "events.jsonl"))

    def samples(self) -> list[Path]:
        """Pictures drawn on the way, by step."""
        return sorted(p for p in (self.folder / "samples").rglob("*") if p.suffix in (".png", ".webp", ".jpg"))

    def adapter(self) -> Adapter:
        """Return the trained adapter.

        Raises:
            RunError: the run has none yet.
        """
        from graft.studio.adapter import Adapter

        if not (self.folder / "result").exists():
            raise RunError(str(self.folder), f"the run is {self.status} and has no result", "Resume it first")
        return Adapter.load(self.folder / "result")

    def request(self, what: str) -> None:
        """Ask the program that trains this run for "stop", "save-now" or "sample-now", at its next step."""
        write_atomic(self.folder / "control" / what, b"")

    def take_request(self, what: str) -> bool:
        """Tell whether something was asked for, and take the request away."""
        path = self.folder / "control" / what
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def write_state(self, **changes: Any) -> None:
        """Replace the given entries of state.json."""
        state = {**self.state, **changes, "time": _now()}
        write_atomic(self.folder / "state.json", (json.dumps(state, indent=1) + "\n").encode())

    def write_event(self, event: str, **facts: Any) -> None:
        """Add a line to events.jsonl."""
        append_line(self.folder / "events.jsonl", {"time": _now(), "event": event, **facts})


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a JSON line with one write call, so that a killed process leaves whole lines or none."""
    data = (json.dumps(row) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file; a last line without its end is not yet one."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def create_run(job: Job, folder: Path | None = None, runs: Path | None = None) -> Run:
    """Make the folder of a new run.

    Args:
        job: it is frozen into the folder.
        folder: the run's own folder, absent or empty; None names one by time, chance and the job's name.
        runs: where named folders go; None is `runs` in the current folder.

    Raises:
        RunError: the folder holds something.
    """
    if folder is None:
        slug = re.sub(r"[^a-z0-9]+", "-", (job.name or str(job.method["name"])).lower()).strip("-")[:40] or "run"
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = (runs or Path("runs")) / f"{stamp}-{secrets.token_hex(2)}-{slug}"
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(str(folder), "it is not an empty folder", "Name a new one, or `graft runs resume` this run")
    for part in ("samples", "checkpoints", "control"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "env.json", (json.dumps(environment(), indent=1) + "\n").encode())
    write_atomic(folder / "job.toml", job.to_toml().encode())
    run = Run(folder)
    run.write_state(status="created", step=0, steps=job.train.steps, attempt=0, message="")
    return run


def open_run(folder: str | Path) -> Run:
    """Return an existing run.

    Raises:
        RunError: the folder is not that of a run.
    """
    folder = Path(folder)
    if not (folder / "job.toml").is_file():
        raise RunError(str(folder), "it is not the folder of a run: it has no job.toml", "See `graft runs list`")
    return Run(folder)


def list_runs(runs: Path = Path("runs")) -> list[Run]:
    """Return the runs in a folder, oldest first."""
    found = [path.parent for path in Path(runs).glob("*/job.toml")] if Path(runs).is_dir() else []
    return [Run(folder) for folder in sorted(found)]


def environment() -> dict[str, Any]:
    """Return versions and machine, for env.json."""
    import torch

    return {
        "python": sys.version.split()[0],
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerators": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "started": _now(),
        "unix_time": time.time(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
