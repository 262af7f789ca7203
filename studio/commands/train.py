"""`graft train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from graft.studio.commands import Answer, add_runs, add_set, command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graft.studio.job import Job
    from graft.studio.runs import Run


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, "train", train, "train an adapter from a job file")
    parser.add_argument("job", metavar="JOB.toml", nargs="+", help="the job; several are trained together if they can")
    add_set(parser, "train.steps=50")
    parser.add_argument("--run-dir", metavar="DIR", help="folder of this run (default: a new one among the runs)")
    add_runs(parser)
    parser.add_argument("--queue", action="store_true", help="let this machine's scheduler train it, and do not wait")
    add_place(parser)
    parser.add_argument("--dry-run", action="store_true", help="tell time, memory and disk, from its first steps")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add a run's place in the queue."""
    parser.add_argument("--priority", type=int, metavar="N", help="in the queue: higher ones go first (default: 0)")
    parser.add_argument("--first", action="store_true", help="before all that wait with the same priority")


def train(args: argparse.Namespace) -> Answer:
    """Run the training, or several."""
    from graft.studio.errors import InputError
    from graft.studio.job import Job

    jobs = [Job.load(path, args.set) for path in args.job]
    if len(jobs) > 1 and args.run_dir:
        raise InputError("--run-dir", f"it names one folder for {len(jobs)} jobs", "Use --runs")
    if not args.queue and (args.first or args.priority is not None):
        raise InputError("--priority, --first", "they are for the queue", "Add --queue")
    if args.dry_run:
        return estimate(jobs, args)
    if args.queue:
        return queue(jobs, args)
    from graft.studio import training

    if len(jobs) > 1:
        runs = training.train_many(jobs, args.runs)
        return Answer([outcome(run) for run in runs], "\n".join(told(run) for run in runs))
    run = training.train(jobs[0], args.run_dir, args.runs)
    return Answer(outcome(run), told(run))


def estimate(jobs: Sequence[Job], args: argparse.Namespace) -> Answer:
    """What each would take alone; no run is made."""
    import shutil
    from dataclasses import asdict
    from pathlib import Path

    from graft.studio import training

    documents, texts = [], []
    where = Path(args.run_dir or args.runs).absolute()
    for job in jobs:
        told = training.estimate(job)
        there = next(path for path in (where, *where.parents) if path.exists())
        rest = (asdict(job.train), job.sample.every, shutil.disk_usage(there).free)
        documents.append(told.document(*rest))
        texts.append(told.text(*rest))
    return Answer(documents if len(jobs) > 1 else documents[0], "\n\n".join(texts))


def queue(jobs: Sequence[Job], args: argparse.Namespace) -> Answer:
    """Let them wait for the scheduler."""
    from graft.studio.errors import InputError
    from graft.studio.runs.queue import submit

    if getattr(args, "run_dir", None):
        raise InputError("--run-dir", "a run of the queue goes among the runs", "Use --runs")
    runs = [submit(job, args.runs, args.priority or 0, args.first) for job in jobs]
    documents = [outcome(run) for run in runs]
    return Answer(documents if len(runs) > 1 else documents[0], "\n".join(told(run) for run in runs))


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
    if status == "queued":
        hint = "graft runs list"
    elif status == "finished":
        domain = registry.domain(run.job.domain)
        look = "preview" if hasattr(domain, "preview") and not hasattr(domain, "predict") else "eval"
        hint = f"graft {look} {run.folder}"
    elif run.state.get("failure") == "out of memory":
        hint = f"graft runs clone {run.folder} --smaller-memory"
    else:
        hint = f"graft runs resume {run.folder}"
    message = f" ({run.state['message']})" if run.state.get("message") else ""
    return f"{run.folder}: {status} at step {run.state['step']}{message}\nNext: {hint}"
