"""A worker that trains nothing: `python -m graft.studio.bench.errand FOLDER` does what a run's method says, and ends.

With it the time of a queue is the scheduler's own. `seconds`: of sleep; `dies`: how many first attempts end by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from graft.studio.config import read_toml
from graft.studio.job import Job, TrainConfig
from graft.studio.runs.folder import Run, create_run, new_folder
from graft.studio.runs.queue import place
from graft.studio.runs.worker import Taken, claimed


def errand(runs: Path, priority: int = 0, order: float | None = None, **does: Any) -> Run:
    """Put an errand among the runs that wait, without telling the scheduler."""
    job = Job(base="none", domain="errand", method={"name": "errand", **does}, data={}, train=TrainConfig(device="cpu"))
    return create_run(job, new_folder(job, runs=runs), queue=place(job.train, priority, order))


def main() -> int:
    """Do it."""
    run = Run(Path(sys.argv[1]))
    try:
        with claimed(run):
            number = int(run.state.get("attempt", 0)) + 1
            method = read_toml(run.folder / "job.toml")["method"]
            run.write_state(status="running", attempt=number, pid=os.getpid())
            run.write_event("started", attempt=number)
            time.sleep(method.get("seconds", 0.0))
            if number <= method.get("dies", 0):
                os.kill(os.getpid(), signal.SIGKILL)
            (run.folder / "result").mkdir(exist_ok=True)
            run.write_state(status="finished", step=run.state["steps"])
            run.write_event("finished")
    except Taken:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
