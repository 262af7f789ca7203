"""`graft train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from graft.studio.commands import Answer, add_runs, add_set, command

if TYPE_CHECKING:
    from graft.studio.runs import Run


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, "train", train, "train an adapter from a job file")
    parser.add_argument("job", metavar="JOB.toml", nargs="+", help="the job; several are trained together if they can")
    add_set(parser, "train.steps=50")
    parser.add_argument("--run-dir", metavar="DIR", help="folder of this run (default: a new one among the runs)")
    add_runs(parser)


def train(args: argparse.Namespace) -> Answer:
    """Run the training, or several."""
    from graft.studio.errors import InputError
    from graft.studio.job import Job

    jobs = [Job.load(path, args.set) for path in args.job]
    if len(jobs) > 1 and args.run_dir:
        raise InputError("--run-dir", f"it names one folder for {len(jobs)} jobs", "Use --runs")
    from graft.studio import training

    if len(jobs) > 1:
        runs = training.train_many(jobs, args.runs)
        return Answer([outcome(run) for run in runs], "\n".join(told(run) for run in runs))
    run = training.train(jobs[0], args.run_dir, args.runs)
    return Answer(outcome(run), told(run))


def outcome(run: Run) -> dict[str, Any]:
    """What a training came to."""
    result, rows = run.folder / "result", run.metrics()
    return {
        "id": run.id,
        "folder": str(run.folder),
        "status": run.status,
        **{key: run.state.get(key) for key in ("step", "steps", "attempt")},
        "result": str(result) if result.exists() else None,
        "metrics": rows[-1] if rows else None,
    }


def told(run: Run) -> str:
    """The same for people, with what to do next."""
    from graft.studio import registry

    status = run.status
    look = "preview" if hasattr(registry.domain(run.job.domain), "preview") else "eval"
    hint = f"graft {look} {run.folder}" if status == "finished" else f"graft runs resume {run.folder}"
    return f"{run.folder}: {status} at step {run.state['step']}\nNext: {hint}"
