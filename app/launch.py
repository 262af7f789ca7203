"""Starting, stopping and going on with trainings: always another process, in a session of its own, on a run folder.

The server may die, be restarted or be closed: no training notices.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.studio.job import Job
from graft.studio.runs import Run, create_run
from graft.studio.runs.folder import new_folder


def submit(job: Mapping[str, Any], runs: Path) -> Run:
    """Make the run of a job, start its training, and return it. Imports the method, and so torch.

    Raises:
        InputError: anything wrong with the job; nothing has been written then.
    """
    checked = Job.load(job)
    run = create_run(checked, new_folder(checked, runs=runs))
    go_on(run)
    return run


def go_on(run: Run) -> None:
    """Train a run that is not finished, from its newest checkpoint or from the start."""
    _detached(run, "runs", "resume", str(run.folder.absolute()))


def stop(run: Run) -> None:
    """Have a training end after a checkpoint; it is signalled if it does not answer."""
    _detached(run, "runs", "stop", str(run.folder.absolute()))


def _detached(run: Run, *argv: str) -> None:
    """Run a command of `graft` whose words go to the run's log."""
    with (run.folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "graft", *argv]
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
