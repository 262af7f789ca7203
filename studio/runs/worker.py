"""The program that trains a run folder: `python -m graft.studio.runs.worker FOLDER`.

Whoever starts a training (a scheduler, Slurm, a shell) starts this one. It takes the locks of the run, and of those
that share its batch, before anything heavy is imported: of two that were started for a run, one goes away again. What
it prints goes to the run's log. A run of a batch of subjects is followed by the next one that has the same base, as
long as that is the next in the queue.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from graft.studio.errors import RunError
from graft.studio.runs.failure import classify
from graft.studio.runs.folder import Run
from graft.studio.runs.index import Index
from graft.studio.runs.lock import RunLock
from graft.studio.runs.machine import announce
from graft.studio.runs.queue import waiting

LAST = ("out of memory", "disk full")
"""Kinds of failures after which a process is not to be trusted with another run."""


class Taken(Exception):
    """The run does not wait any more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the run whose folder is given, and perhaps others after it; return an exit code."""
    (name,) = sys.argv[1:] if argv is None else argv
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # a scheduler asks where a run hangs
    run = Run(Path(name).absolute())
    if os.environ.get("RANK", "0") != "0":
        return _help(run)
    return work(run)


def work(run: Run) -> int:
    """Train a run if it waits, then others of its batch; return an exit code."""
    errors: list[BaseException] = []
    following: Run | None = run
    while following is not None:
        try:
            with claimed(following) as members:
                errors += _train(following, members)
        except Taken:
            if following is run:
                break
            time.sleep(0.05)
        following = _next(run) if not any(classify(error).kind in LAST for error in errors) else None
    announce(run.folder.parent)  # others may start, even if the scheduler was killed meanwhile
    return 1 if errors else 0


@contextmanager
def claimed(run: Run) -> Iterator[list[Run]]:
    """Hold a run that waits, and those that are trained with it.

    Raises:
        Taken: it does not wait, or another process has one of them.
    """
    facts = {key: os.environ.get(f"GRAFT_{key.upper()}", "") for key in ("launch", "use", "share")}
    with ExitStack() as stack:
        for member in sorted(together(run), key=lambda member: member.id):
            try:
                stack.enter_context(RunLock(member.folder, **facts))
            except (RunError, OSError) as error:
                raise Taken from error
        members = together(run)
        if run.state["status"] != "queued" or run not in members:
            raise Taken
        yield members


def together(run: Run) -> list[Run]:
    """The runs that share a batch with a run of the queue: once begun, always the same; before, those that wait."""
    if run.state.get("attempt", 0):
        return [Run(run.folder.parent / member.id) for member in run.group]
    names = (run.state.get("queue") or {}).get("together") or [run.id]
    found = [Run(run.folder.parent / name) for name in names if (run.folder.parent / name / "state.json").exists()]
    return [member for member in found if member.state["status"] == "queued" and not member.state.get("attempt", 0)]


def _train(run: Run, members: list[Run]) -> list[BaseException]:
    """Train; every failure is in the state of the run that it belongs to."""
    _log_to(run.folder / "log.txt")
    cwd = run.state["queue"].get("cwd", "")
    if cwd and Path(cwd).is_dir():
        os.chdir(cwd)
    from graft.studio import registry
    from graft.studio.training import go_on_apart

    if run.state["queue"].get("batch"):
        registry.keep_bases()
    try:
        return go_on_apart(members)
    except BaseException:
        logging.getLogger("graft").critical("the worker ends", exc_info=True)
        raise


def _next(run: Run) -> Run | None:
    """The next run of the queue, if it belongs to the same batch of subjects and has the same base and devices."""
    index = Index(run.folder.parent)
    index.refresh()
    now = time.time()
    line = [row for row in waiting(index.rows(["queued"])) if row["queue"].get("not_before", 0) <= now]
    index.close()
    mine = run.state
    if not line or not mine["queue"].get("batch") or _kind(line[0]) != _kind(mine):
        return None
    return Run(run.folder.parent / line[0]["id"])


def _kind(state: Mapping[str, Any]) -> tuple[object, ...]:
    queue = state["queue"]
    return state.get("base"), queue.get("batch"), queue.get("device"), queue.get("processes"), queue.get("cwd")


def _log_to(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _help(run: Run) -> int:
    """What the other processes of a run on several devices do: train, and end with the one that launched them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    from graft.studio.training import go_on

    go_on([run])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
