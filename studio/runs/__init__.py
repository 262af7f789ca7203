"""Run folders: everything that a training leaves on disk, and the only truth about it."""

from graft.studio.runs.checkpoints import Checkpoint, latest_checkpoint, write_checkpoint
from graft.studio.runs.folder import Run, create_run, list_runs, open_run
from graft.studio.runs.lock import RunLock, holder

__all__ = [
    "Checkpoint",
    "Run",
    "RunLock",
    "create_run",
    "holder",
    "latest_checkpoint",
    "list_runs",
    "open_run",
    "write_checkpoint",
]
