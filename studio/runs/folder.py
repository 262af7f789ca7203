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
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.config import suggest
from graft.studio.disk import append_line, read_lines, require_empty, write_atomic, write_json
from graft.studio.errors import RunError
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
        """`status`, `step`, `steps`, `attempt`, `message`; `failure`, a word; `queue`, what a scheduler needs."""
        path = self.folder / "state.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"status": "created", "step": 0}

    @property
    def status(self) -> str:
        """created, queued, running, stopped, failed, finished or interrupted."""
        status = str(self.state["status"])
        return "interrupted" if status == "running" and holder(self.folder) is None else status

    @property
    def group(self) -> list[Run]:
        """The runs that are trained in one batch with this one, itself among them; the first has the checkpoints."""
        path = self.folder / "group.json"
        names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else [self.folder.name]
        return [Run(self.folder.parent / name) for name in names]

    def metrics(self) -> list[dict[str, Any]]:
        """Logged figures by step; where a step was trained twice, after a resume, the later line counts."""
        rows = {row["step"]: row for row in read_lines(self.folder / "metrics.jsonl") if "step" in row}
        return [rows[step] for step in sorted(rows)]

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order: queued, started, checkpoint, sample, retry, stopped, failed, finished."""
        return read_lines(self.folder / "events.jsonl")

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

    def freeze(self, job: Job) -> None:
        """Replace the job by one whose open settings are settled, before the run's first step."""
        if job != self.job:
            write_atomic(self.folder / "job.toml", job.to_toml().encode())

    def write_env(self, facts: Mapping[str, Any]) -> None:
        """Write env.json: versions, the machine, and what else is known."""
        write_json(self.folder / "env.json", {**environment(), **facts})

    def write_state(self, **changes: Any) -> None:
        """Replace the given entries of state.json."""
        state = {**self.state, **changes, "time": _now()}
        write_json(self.folder / "state.json", state)

    def write_event(self, event: str, **facts: Any) -> None:
        """Add a line to events.jsonl."""
        append_line(self.folder / "events.jsonl", {"time": _now(), "event": event, **facts})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_folder(job: Job, folder: str | Path | None = None, runs: str | Path | None = None) -> Path:
    """Return where a new run goes.

    Args:
        job: gives the run its name.
        folder: the run's own folder, absent or empty; None names one by time, chance and the job's name.
        runs: where named folders go; None is `runs` in the current folder.

    Raises:
        RunError: the folder holds something.
    """
    if folder is None:
        slug = re.sub(r"[^a-z0-9]+", "-", (job.name or str(job.method["name"])).lower()).strip("-")[:40] or "run"
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = Path(runs or "runs") / f"{stamp}-{secrets.token_hex(4)}-{slug}"
    folder = Path(folder).absolute()
    require_empty(folder, RunError, "Name a new one, or `graft runs resume` this run")
    return folder


def create_run(
    job: Job, folder: Path, facts: Mapping[str, Any] | None = None, queue: Mapping[str, Any] | None = None
) -> Run:
    """Make the folder of a new run, whole or not at all.

    Args:
        job: it is frozen into the folder.
        folder: as `new_folder` returns it.
        facts: what else env.json is to say.
        queue: of a run that is to wait for a scheduler; what trains it will write env.json.

    Raises:
        DiskFullError: no space.
    """
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        for part in ("samples", "checkpoints", "control"):
            (draft / part).mkdir(parents=True)
        write_atomic(draft / "job.toml", job.to_toml().encode())
        state: dict[str, Any] = {"step": 0, "steps": job.train.steps, "attempt": 0, "message": ""}
        state |= {"base": job.base, "domain": job.domain, "method": job.method["name"], "name": job.name}
        if queue is None:
            Run(draft).write_env(facts or {})
            Run(draft).write_state(status="created", **state)
        else:
            Run(draft).write_state(status="queued", **state, queue={"together": [folder.name], **queue})
            Run(draft).write_event("queued")
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Run(folder)


def open_run(folder: str | Path) -> Run:
    """Return an existing run.

    Raises:
        RunError: the folder is not that of a run.
    """
    folder = Path(folder)
    if not (folder / "job.toml").is_file():
        raise RunError(str(folder), "it is not the folder of a run: it has no job.toml", "See `graft runs list`")
    return Run(folder)


def list_runs(runs: str | Path = "runs") -> list[Run]:
    """Return the runs in a folder, oldest first."""
    found = [path.parent for path in Path(runs).glob("[!.]*/job.toml")] if Path(runs).is_dir() else []
    return [Run(folder) for folder in sorted(found)]


def find_run(name: str, runs: str | Path = "runs") -> Run:
    """Return a run by its folder, its id, or the only beginning or end of an id that fits.

    Raises:
        RunError: none fits, or several do.
    """
    if (Path(name) / "job.toml").is_file():
        return Run(Path(name))
    known = list_runs(runs)
    fit = [run for run in known if run.id == name] or [r for r in known if r.id.startswith(name) or r.id.endswith(name)]
    if len(fit) != 1:
        reason = f"{len(fit)} runs fit" if fit else f"there is no such run in {runs}"
        raise RunError(f"run {name!r}", reason, suggest(name, [run.id for run in fit or known]))
    return fit[0]


def environment() -> dict[str, Any]:
    """Return versions and machine, for env.json."""
    import torch

    return {
        "python": sys.version.split()[0],
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerators": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "commit": _commit(),
        "created": _now(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it does."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
