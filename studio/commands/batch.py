"""`graft batch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graft.studio.commands import Answer, add_runs, add_set, cell, command, table

if TYPE_CHECKING:
    from graft.studio.batch import Batch

SHOWN = ("subject", "method", "status", "step", "steps", "loss", "message")


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, "batch", batch, "train every subject of a manifest with every method, or go on with it")
    parser.add_argument("manifest", metavar="MANIFEST", help="a .toml, .csv or .jsonl file with a row for each subject")
    parser.add_argument("--job", action="append", default=[], metavar="JOB.toml", help="a method's job; repeatable")
    parser.add_argument("--name", metavar="NAME", help="of the batch (default: the manifest's)")
    parser.add_argument(
        "--engine", choices=("local", "ray", "slurm"), default="local", help="who trains (default: local)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes at once (default: 1)")
    parser.add_argument(
        "--together", type=int, default=16, metavar="N", help="most jobs trained in one batch (default: 16)"
    )
    add_set(parser, "train.steps=50")
    add_runs(parser)


def batch(args: argparse.Namespace) -> Answer:
    """Train what is missing, and write the summary."""
    from pathlib import Path

    from graft.studio.batch import prepare_batch, read_manifest, run_batch
    from graft.studio.batch.summary import write_summary
    from graft.studio.config import require

    for name in ("workers", "together"):
        require(f"--{name}", getattr(args, name), getattr(args, name) >= 1, "1 or more")
    entries = read_manifest(args.manifest, args.job, args.set)
    name = args.name or Path(args.manifest).stem
    made = prepare_batch(entries, name, args.runs, args.workers, args.together, args.engine)
    with live() as show:
        run_batch(made, args.engine, args.workers, show)
    document = write_summary(made)
    told = ", ".join(f"{count} {status}" for status, count in sorted(document["counts"].items()))
    text = f"{table(document['runs'], SHOWN)}\n\n{told}\n{made.folder / 'summary.csv'}\n{made.folder / 'sheet.png'}"
    return Answer(document, text, code=0 if set(document["counts"]) == {"finished"} else 1)


@contextmanager
def live() -> Iterator[Callable[[Batch], None]]:
    """Yield what shows a batch on standard error: a table for people, a line for files when something has changed."""
    from graft.studio.batch.summary import counts, rows

    if not sys.stderr.isatty():
        last = ""

        def line(batch: Batch) -> None:
            nonlocal last
            told = ", ".join(f"{count} {status}" for status, count in sorted(counts(batch).items()))
            if told != last:
                print(f"{batch.name}  {told}", file=sys.stderr, flush=True)
            last = told

        yield line
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    with Live(console=Console(stderr=True), refresh_per_second=4) as screen:

        def draw(batch: Batch) -> None:
            shown = Table(*SHOWN)
            for row in rows(batch):
                shown.add_row(*(cell(row[key]) for key in SHOWN))
            screen.update(shown)

        yield draw
