"""What this machine has, and where its scheduler keeps what can be lost: a lock, a log, addresses of runs folders."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from graft.studio.disk import write_atomic
from graft.studio.runs.lock import holder

OUTER = "GRAFT_OUTER"
QUIET = "GRAFT_QUIET"
"""Set on a cluster's nodes: nobody starts a scheduler there."""
PATIENCE = 3.0
"""Seconds that a scheduler may take to start, before this process starts another."""
_started: dict[Path, float] = {}


def machine_folder() -> Path:
    """`$GRAFT_STATE`, else `~/.local/state/graft`: on a disk of this machine."""
    return Path(os.environ.get("GRAFT_STATE") or Path.home() / ".local" / "state" / "graft")


def key_of(runs: Path) -> str:
    """The name of a runs folder here."""
    return hashlib.sha256(str(runs).encode()).hexdigest()[:16]


def announce(runs: Path) -> None:
    """Tell the scheduler of a runs folder in which something has changed, and start one if there is none."""
    runs = runs.resolve()
    write_atomic(machine_folder() / "roots" / key_of(runs), str(runs).encode())
    ensure_scheduler()


def roots_stamp() -> int:
    """What every announcement changes."""
    try:
        return (machine_folder() / "roots").stat().st_mtime_ns
    except OSError:
        return 0


def known_roots() -> dict[Path, int]:
    """Runs folders that were announced, each with a stamp that every announcement changes."""
    roots = {}
    for file in (machine_folder() / "roots").glob("[0-9a-f]*"):
        try:
            root, stamp = Path(file.read_text(encoding="utf-8")), file.stat().st_mtime_ns
            if root.is_dir():
                roots[root] = stamp
        except OSError:
            continue  # replaced at this moment: seen the next time
    return roots


def ensure_scheduler() -> None:
    """Start this machine's scheduler, in a session of its own, unless it is there. Of two, one goes away again."""
    folder = machine_folder()
    folder.mkdir(parents=True, exist_ok=True)
    now = time.monotonic()
    if QUIET in os.environ or holder(folder) is not None or now - _started.get(folder, -PATIENCE) < PATIENCE:
        return
    _started[folder] = now
    with (folder / "scheduler.log").open("ab") as log:
        command = [sys.executable, "-m", "graft.studio.runs.scheduler"]
        null, env = subprocess.DEVNULL, outer_environment()
        subprocess.Popen(command, stdin=null, stdout=log, stderr=log, start_new_session=True, cwd="/", env=env)


def inner_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's variables with changes for a worker, which can tell what they were."""
    before = {name: os.environ.get(name) for name in changes}
    return {**os.environ, **changes, OUTER: json.dumps(before)}


def outer_environment() -> dict[str, str]:
    """This process's variables; in a worker, those without what was changed for it."""
    env = dict(os.environ)
    for name, value in json.loads(env.pop(OUTER, "{}")).items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def devices() -> list[str]:
    """The devices of this machine, told without loading torch: "cuda:0", ...; "cpu" is always the last.

    `GRAFT_DEVICES`, names with commas between them, says it instead; "cpu,cpu" lets two jobs share the processor.
    """
    if told := os.environ.get("GRAFT_DEVICES"):
        return [name.strip() for name in told.split(",") if name.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if visible is not None:
        count = min(count, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return [*(f"cuda:{k}" for k in range(count)), "cpu"]
