"""The lock of a run folder: held by the one program that trains it, freed by the kernel when that program is gone.

A POSIX record lock (`lockf`) belongs to the process: a forked data worker that outlives its parent does not keep it, as
it would keep a `flock`. It also means that a second `RunLock` in the *same* process is not kept out by the kernel, and
that closing any descriptor of the file drops the lock; so a process keeps one table of what it holds, and readers in
the same process look there first. The file names the process and when it was started: a second witness, before anybody
sends a signal to a number that may belong to another process by now.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from graft.studio.errors import RunError

_held: set[Path] = set()


class RunLock:
    """Holds a run folder while it is entered.

    Args:
        folder: of the run.
        facts: what the lock's file says beside the process, for those who read it.

    Raises:
        RunError: on entering, when another program (or this one) trains the run.
    """

    def __init__(self, folder: Path, **facts: Any):
        self.path, self.facts = Path(folder).resolve() / "lock", facts

    def __enter__(self) -> RunLock:
        if self.path in _held:
            raise self._busy(os.getpid())
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for wait in (0.02, 0.1, 0.5, None):  # `holder` in another process may have it for a moment
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if wait is None:
                    text = os.read(self._descriptor, 4096)
                    os.close(self._descriptor)
                    raise self._busy(_pid(text)) from error
                time.sleep(wait)
        _held.add(self.path)
        text = json.dumps({"pid": os.getpid(), "started": start_time(os.getpid()), **self.facts}).encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        _held.discard(self.path)
        os.close(self._descriptor)

    def _busy(self, pid: int | None) -> RunError:
        who = f"process {pid}" if pid else "another process"
        return RunError(str(self.path.parent), f"{who} is training this run", "Wait for it, or stop it first")


def holder(folder: Path) -> int | None:
    """Return the process that holds a run folder, 0 if its number is unknown, or None if nobody does."""
    facts = lock_facts(folder)
    return None if facts is None else int(facts.get("pid", 0))


def lock_facts(folder: Path) -> dict[str, Any] | None:
    """Return what the holder of a run folder wrote about itself, or None if nobody holds it.

    A process that is not the one that wrote it (its start time differs) counts as unknown: `pid` is left out.
    """
    path = Path(folder).resolve() / "lock"
    if path in _held:
        return {"pid": os.getpid()}  # opening and closing the file would free the lock
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        facts = _facts(os.read(descriptor, 4096))
        if "started" in facts and start_time(int(facts.get("pid", 0))) not in (None, facts["started"]):
            facts.pop("pid", None)
        return facts
    finally:
        os.close(descriptor)
    return None


def start_time(pid: int) -> str | None:
    """Return when a process of this machine was started, as a text that no later process of its number shares."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None  # no Linux, or the process is gone
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"


def _facts(text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _pid(text: bytes) -> int | None:
    pid = _facts(text).get("pid")
    return int(pid) if pid else None
