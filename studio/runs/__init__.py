"""Run folders: everything that a training leaves on disk, and the only truth about it."""

from graft.studio.runs.folder import Run, create_run, find_run, list_runs, open_run
from graft.studio.runs.lock import RunLock, holder
from graft.studio.runs.queue import submit, wait

__all__ = ["Run", "RunLock", "create_run", "find_run", "holder", "list_runs", "open_run", "submit", "wait"]
