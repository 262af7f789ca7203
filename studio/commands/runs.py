"""`graft runs`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from graft.studio.commands import Answer, add_runs, add_set, command, group, table
from graft.studio.commands.train import add_place, outcome, queue, told


def add(commands: Any) -> None:
    """Add the commands."""
    inner = group(commands, "runs", "list, show, stop, resume, order and clone trainings")
    parser = command(inner, "list", list_, "list the runs, oldest first, and their places in the queue")
    parser.add_argument("--status", metavar="NAME", help="only those that are queued, running, failed, ...")
    add_runs(parser)
    for name, run, help in (
        ("show", show, "show one run: its job, state, last figures and events"),
        ("logs", logs, "print the log of a run"),
        ("stop", stop, "stop a run after its next step, having saved, or take it out of the queue"),
        ("resume", resume, "go on with a run that is not finished"),
        ("order", order, "change the place of a run in the queue"),
        ("clone", clone, "train the job of a run once more, in a new run"),
    ):
        parser = command(inner, name, run, help)
        parser.add_argument("name", metavar="RUN", help="folder, id, or a beginning or end of an id that fits only one")
        add_runs(parser)
        if name == "logs":
            parser.add_argument(
                "--lines", type=int, default=100, metavar="N", help="the last lines only (default: 100)"
            )
        if name == "stop":
            parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait for the end")
        if name in ("resume", "clone"):
            parser.add_argument("--queue", action="store_true", help="let this machine's scheduler do it")
        if name in ("resume", "clone", "order"):
            add_place(parser)
        if name == "order":
            parser.add_argument("--last", action="store_true", help="behind all that wait with the same priority")
            where = "of another priority, it takes that one's"
            parser.add_argument("--up", action="store_true", help=f"one place ahead; where it passes a run {where}")
            parser.add_argument("--down", action="store_true", help="one place back, likewise")
        if name == "clone":
            add_set(parser, "train.steps=50")
            parser.add_argument("--smaller-memory", action="store_true", help="half the batch, accumulated twice")


def list_(args: argparse.Namespace) -> Answer:
    """Status and progress of all runs."""
    from pathlib import Path

    from graft.studio.runs.index import Index
    from graft.studio.runs.machine import ensure_scheduler
    from graft.studio.runs.queue import waiting, will_retry

    index = Index(Path(args.runs))
    index.refresh()
    found = index.rows()
    places = {row["id"]: place for place, row in enumerate(waiting(found), start=1)}
    if places or any(will_retry(row) for row in found):
        ensure_scheduler()  # it may have been killed
    keys = ("status", "step", "steps", "attempt", "time", "failure", "message")
    rows = [
        {"id": row["id"], "place": places.get(row["id"]), **{key: row.get(key) for key in keys}}
        for row in found
        if args.status in (None, row["status"])
    ]
    columns = ("id", "status", *(["place"] if places else []), "step", "steps", "message")
    return Answer(rows, table(rows, columns) if rows else f"no runs in {args.runs}")


def show(args: argparse.Namespace) -> Answer:
    """Everything about one run."""
    from graft.studio.config import read_toml
    from graft.studio.runs import find_run

    run = find_run(args.name, args.runs)
    document = {
        **outcome(run),
        "state": run.state,
        "job": read_toml(run.folder / "job.toml"),
        "events": run.events(),
        "samples": [str(path) for path in run.samples()],
    }
    job = (run.folder / "job.toml").read_text(encoding="utf-8")
    events = table(run.events(), ("time", "event", "step"))
    last = json.dumps(document["metrics"])
    return Answer(document, f"{told(run)}\n\n{job}\nlast: {last}\n\n{events}")


def logs(args: argparse.Namespace) -> Answer:
    """The end of the log."""
    from graft.studio.runs import find_run

    path = find_run(args.name, args.runs).folder / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = lines[-args.lines :]
    return Answer({"lines": lines}, "\n".join(lines))


def stop(args: argparse.Namespace) -> Answer:
    """Ask, wait, insist."""
    from graft.studio.runs import find_run
    from graft.studio.runs.queue import cancel
    from graft.studio.runs.stop import stop_run

    run = find_run(args.name, args.runs)
    if args.no_wait and not cancel(run):
        run.group[0].request("stop")
        return Answer(outcome(run), f"{run.folder}: asked to stop")
    stop_run(run)
    return Answer(outcome(run), told(run))


def resume(args: argparse.Namespace) -> Answer:
    """Train on."""
    from graft.studio.runs import find_run
    from graft.studio.runs.queue import requeue

    run = find_run(args.name, args.runs)
    if args.queue:
        requeue(run, args.priority, args.first)
    else:
        from graft.studio.training import resume

        resume(run)
    return Answer(outcome(run), told(run))


def order(args: argparse.Namespace) -> Answer:
    """Another place among those that wait."""
    from graft.studio.errors import InputError
    from graft.studio.runs import find_run
    from graft.studio.runs.queue import move, shift

    run = find_run(args.name, args.runs)
    if not (args.up or args.down):
        move(run, args.priority, args.first, args.last)
    elif args.priority is not None or args.up + args.down + args.first + args.last > 1:
        raise InputError("--up, --down", "each says the whole place", "Give one of them alone")
    else:
        shift(run, -1 if args.up else 1)
    return Answer({**outcome(run), "queue": run.state["queue"]}, told(run))


def clone(args: argparse.Namespace) -> Answer:
    """A new run of the same job, with changes."""
    from graft.studio.job import Job
    from graft.studio.runs import find_run
    from graft.studio.runs.queue import smaller

    job = Job.load(find_run(args.name, args.runs).folder / "job.toml", args.set)
    job = smaller(job) if args.smaller_memory else job
    if args.queue:
        return queue([job], args)
    from graft.studio.training import train

    run = train(job, runs=args.runs)
    return Answer(outcome(run), told(run))
