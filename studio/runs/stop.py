"""Stopping a run from outside: first ask, then signal, at last kill. Nothing but the last step costs any work."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from graft.studio.errors import RunError
from graft.studio.runs.folder import Run
from graft.studio.runs.lock import RunLock, holder
from graft.studio.runs.queue import cancel

ASK, TERMINATE = 30.0, 30.0
"""Seconds after which asking, then SIGTERM, is given up."""


def stop_run(run: Run, ask: float = ASK, terminate: float = TERMINATE) -> str:
    """Stop a training and return its status then: stopped, or interrupted if it had to be killed.

    A run that waits in the queue leaves it. One that a scheduler started is stopped, too, where it had to be killed, so
    that nobody tries it again.

    Args:
        run: any run; one that neither runs nor waits is left alone.
        ask: seconds to wait for the run to save and end by itself.
        terminate: seconds to wait after SIGTERM, which asks once more.

    Raises:
        RunError: its process is not known, or belongs to someone else.
    """
    lead = run.group[0]
    if cancel(run) or holder(lead.folder) is None:
        return run.status
    lead.request("stop")
    for wait, sent in ((ask, signal.SIGTERM), (terminate, signal.SIGKILL), (5.0, None)):
        if _ended(lead, wait):
            break
        pid = holder(lead.folder)
        if pid == 0:
            raise RunError(str(run.folder), "it does not answer and its process is not known", "Stop it by hand")
        if sent is not None and pid is not None:
            _send(run, pid, sent)
    for member in run.group:
        if member.state.get("queue"):
            mark_stopped(member)
    lead.take_request("stop")
    return run.status


def end_process(run: Run, terminate: float = TERMINATE) -> None:
    """Make the process of a run that hangs say where, then end it; whoever finds the run interrupted may go on.

    Raises:
        RunError: its process is not known, or belongs to someone else.
    """
    for sent, wait in ((signal.SIGUSR1, 1.0), (signal.SIGTERM, terminate), (signal.SIGKILL, 5.0)):
        pid = holder(run.folder)
        if pid is None:
            return
        if pid == 0:
            raise RunError(str(run.folder), "it hangs and its process is not known", "Stop it by hand")
        _send(run, pid, sent)
        if _ended(run, wait):
            return


def mark_stopped(run: Run) -> None:
    """Write down that a run of the queue was killed on request: it is not to be tried again."""
    with suppress(RunError), RunLock(run.folder):
        if run.state["status"] in ("running", "queued"):
            run.write_state(status="stopped", message="killed when it did not stop by itself")
            run.write_event("stopped", message="killed")


def _send(run: Run, pid: int, sent: signal.Signals) -> None:
    # The lock names the process and is held while it lives, so this is no other one that got its number.
    # One that a scheduler started leads a session: its data workers go with it.
    try:
        if sent == signal.SIGKILL and os.getpgid(pid) == pid and os.getsid(pid) == pid:
            os.killpg(pid, sent)
        else:
            os.kill(pid, sent)
    except ProcessLookupError:
        return
    except PermissionError:
        raise RunError(str(run.folder), f"process {pid} belongs to another user", "Ask them to stop it") from None


def _ended(run: Run, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while holder(run.folder) is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True
