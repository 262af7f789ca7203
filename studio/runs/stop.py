"""Stopping a run from outside: first ask, then signal, at last kill. Nothing but the last step costs any work."""

from __future__ import annotations

import os
import signal
import time

from graft.studio.errors import RunError
from graft.studio.runs.folder import Run
from graft.studio.runs.lock import holder

ASK, TERMINATE = 30.0, 30.0
"""Seconds after which asking, then SIGTERM, is given up."""


def stop_run(run: Run, ask: float = ASK, terminate: float = TERMINATE) -> str:
    """Stop a running training and return its status then: stopped, or interrupted if it had to be killed.

    Args:
        run: any run; one that is not running is left alone.
        ask: seconds to wait for the run to save and end by itself.
        terminate: seconds to wait after SIGTERM, which asks once more.

    Raises:
        RunError: its process is not known, or belongs to someone else.
    """
    lead = run.group[0]
    if holder(lead.folder) is None:
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
    lead.take_request("stop")
    return run.status


def _send(run: Run, pid: int, sent: signal.Signals) -> None:
    # The lock names the process and is held while it lives, so this is no other one that got its number.
    try:
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
