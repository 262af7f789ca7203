"""`graft data`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, add_set, command, group


def add(commands: Any) -> None:
    """Add the commands."""
    inner = group(commands, "data", "look at what a job is trained on")
    parser = command(inner, "preview", preview, "show rows as the model reads them: what is learnt, what is masked")
    parser.add_argument("job", metavar="JOB.toml", help="the job")
    add_set(parser, "data.length=512")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="how many, the first ones (default: 8)")
    parser.add_argument("--out", metavar="FILE", help="page to write, with the pictures in it")


def preview(args: argparse.Namespace) -> Answer:
    """Rows of a job's data as tokens."""
    from graft.studio import registry
    from graft.studio.errors import InputError
    from graft.studio.job import Job

    job = Job.load(args.job, args.set)
    domain = registry.domain(job.domain)
    if not hasattr(domain, "show_rows"):
        raise InputError("graft data preview", f"{job.domain} has no rows of tokens", "Use it with domain llm_mm")
    shown = domain.show_rows(job, args.rows)
    document = {"rows": shown.rows}
    if not args.out:
        return Answer(document, shown.text)
    page = Path(args.out)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(shown.page, encoding="utf-8")
    return Answer({**document, "page": str(page)}, f"{shown.text}\nPage: {page}")
