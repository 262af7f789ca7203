"""Starting, stopping and going on with trainings: by the machine's queue, which needs no server.

The server may die, be restarted or be closed: no training notices.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.studio.runs import Run
from graft.studio.runs.queue import requeue
from graft.studio.runs.queue import submit as put


def submit(job: Mapping[str, Any], runs: Path) -> Run:
    """Put a job into the queue and return its run. Imports the method, and so torch.

    Raises:
        InputError: anything wrong with the job; nothing has been written then.
    """
    return put(job, runs)


def go_on(run: Run) -> None:
    """Put a run that is not finished back into the queue; it goes on from its newest checkpoint."""
    requeue(run)


def stop(run: Run) -> None:
    """Have a training end after a checkpoint; it is signalled if it does not answer, by another process that waits."""
    with (run.folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "graft", "runs", "stop", str(run.folder.absolute())]
        null = subprocess.DEVNULL
        subprocess.Popen(command, stdin=null, stdout=null, stderr=log, start_new_session=True)
