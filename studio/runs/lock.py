"""The lock of a run folder: held by the one program that trains it, freed by the kernel when that program is gone.

A POSIX record lock (`lockf`) belongs to the process: a forked data worker that outlives its parent does not keep it, as
it would keep a `flock`. It also means that a second `RunLock` in the *same* process is not kept out by the kernel, and
that closing any descriptor of the file drops the lock; so a process keeps one table of what it holds, and readers in
the same process look there first.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType

from graft.studio.errors import RunError

_held: set[Path] = set()


class RunLock:
    """Holds a run folder while it is entered.

    Raises:
        RunError: on entering, when another program (or this one) trains the run.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder).resolve() / "lock"

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
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"pid": os.getpid()}).encode(), 0)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        _held.discard(self.path)
        os.close(self._descriptor)

    def _busy(self, pid: int | None) -> RunError:
        who = f"process {pid}" if pid else "another process"
        return RunError(str(self.path.parent), f"{who} is training this run", "Wait for it, or stop it first")


def holder(folder: Path) -> int | None:
    """Return the process that holds a run folder, 0 if its number is unknown, or None if nobody does."""
    path = Path(folder).resolve() / "lock"
    if path in _held:
        return os.getpid()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _pid(os.read(descriptor, 4096)) or 0
    finally:
        os.close(descriptor)
    return None


def _pid(text: bytes) -> int | None:
    try:
        return int(json.loads(text)["pid"])
    except (ValueError, KeyError, TypeError):
        return None
