"""`graft runs`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from graft.studio.commands import Answer, add_runs, command, group, table
from graft.studio.commands.train import outcome, told


def add(commands: Any) -> None:
    """Add the commands."""
    inner = group(commands, "runs", "list, show, stop and resume trainings")
    add_runs(command(inner, "list", list_, "list the runs, oldest first"))
    for name, run, help in (
        ("show", show, "show one run: its job, state, last figures and events"),
        ("logs", logs, "print the log of a run"),
        ("stop", stop, "stop a run after its next step; it saves first"),
        ("resume", resume, "go on with a stopped, failed or interrupted run"),
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


def list_(args: argparse.Namespace) -> Answer:
    """Status and progress of all runs."""
    from graft.studio.runs import list_runs

    rows = []
    for run in list_runs(args.runs):
        state = run.state
        keys = ("step", "steps", "attempt", "time", "message")
        rows.append({"id": run.id, "status": run.status, **{key: state.get(key) for key in keys}})
    empty = f"no runs in {args.runs}"
    return Answer(rows, table(rows, ("id", "status", "step", "steps", "message")) if rows else empty)


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
    from graft.studio.runs.stop import stop_run

    run = find_run(args.name, args.runs)
    if args.no_wait:
        run.group[0].request("stop")
        return Answer(outcome(run), f"{run.folder}: asked to stop")
    stop_run(run)
    return Answer(outcome(run), told(run))


def resume(args: argparse.Namespace) -> Answer:
    """Train on."""
    from graft.studio.runs import find_run
    from graft.studio.training import resume

    run = resume(find_run(args.name, args.runs))
    return Answer(outcome(run), told(run))
