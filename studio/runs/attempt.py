"""One attempt at a training: its runs are locked, its log is written, and their state is true whatever happens."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from graft.studio.errors import DiskFullError
from graft.studio.runs.failure import Failure, classify
from graft.studio.runs.folder import Run
from graft.studio.runs.lock import RunLock

log = logging.getLogger("graft")


@dataclass
class Attempt:
    """How it goes."""

    number: int
    """Counted from 1."""
    status: str = "finished"
    """What the runs' state will say if nothing fails; the loop may set it to stopped."""
    failures: dict[int, str] = field(default_factory=dict)
    """Runs, by place, that failed without harm to the others, and how."""


@contextmanager
def attempt(runs: Sequence[Run], threads: int, locked: bool = False) -> Iterator[Attempt]:
    """Hold runs while a training works on them. Without runs (a helper process of many) nothing is done.

    Args:
        runs: what is trained.
        threads: of the CPU, for the state.
        locked: this process holds them already.

    Raises:
        RunError: another program trains one of them.
    """
    with ExitStack() as stack:
        for run in runs:
            if not locked:
                stack.enter_context(RunLock(run.folder))
                run.take_request("stop")  # one that came too late for the attempt before
            stack.enter_context(_logged(run.folder / "log.txt"))
        number = 1 + max((int(run.state.get("attempt", 0)) for run in runs), default=0)
        for run in runs:
            run.write_state(status="running", attempt=number, pid=os.getpid(), threads=threads, message="", failure="")
            run.write_event("started", attempt=number)
        this = Attempt(number)
        try:
            yield this
        except BaseException as error:
            log.error("failed", exc_info=True)
            fail(runs, error)
            raise
        _end([run for place, run in enumerate(runs) if place not in this.failures], this.status)
        for place, message in this.failures.items() if runs else ():
            _end([runs[place]], "failed", message, "error")


def fail(runs: Sequence[Run], error: BaseException) -> Failure:
    """Write into runs how they failed; a full disk, one reason to be here, must not hide it."""
    failure = classify(error)
    with suppress(DiskFullError):
        _end(runs, "failed", failure.message, failure.kind)
    return failure


def _end(runs: Sequence[Run], status: str, message: str = "", failure: str = "") -> None:
    for run in runs:
        run.write_state(status=status, message=message, failure=failure)
        run.write_event(status, message=message)


class _LogFile(logging.FileHandler):
    """The log of a run. It is for people: when the disk is full, the files that matter say so."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    handler = _LogFile(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):
            handler.close()
