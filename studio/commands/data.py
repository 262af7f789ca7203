"""`graft data`: what there is to train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, add_set, command, group, settings


def add(commands: Any) -> None:
    """Add the commands; each has a function of its own that adds its arguments."""
    inner = group(commands, "data", "look at training data, and caption pictures")
    for add_one in (_add_doctor, _add_caption, _add_preview):
        add_one(inner)


def _add_doctor(inner: Any) -> None:
    parser = command(inner, "doctor", doctor, "look for what is wrong with pictures and captions")
    parser.add_argument("path", metavar="PATH_OR_JOB", help="a folder of pictures, or a job file")
    parser.add_argument("--out", metavar="FILE", help="contact sheet, PNG: the pictures as they will be trained on")
    parser.add_argument("--trigger", metavar="WORD", help="what captions must contain (default: the job's)")
    add_set(parser, "resolution=768; of a job, data.resolution=768")


def _add_caption(inner: Any) -> None:
    parser = command(inner, "caption", caption, "write captions beside pictures by a captioning model")
    parser.add_argument("path", metavar="DIR", help="a folder of pictures, searched with its sub-folders")
    parser.add_argument("--model", required=True, metavar="NAME", help="a hub id, or a folder of transformers")
    parser.add_argument("--prefix", default="", metavar="TEXT", help='what captions begin with, such as "sks dog, "')
    parser.add_argument("--prompt", metavar="TEXT", help="what a model that follows instructions is asked")
    parser.add_argument("--max-tokens", type=int, default=60, metavar="N", help="length at most (default: 60)")
    parser.add_argument("--overwrite", action="store_true", help="replace captions that are there")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one)")


def _add_preview(inner: Any) -> None:
    parser = command(inner, "preview", preview, "show rows as the model reads them: what is learnt, what is masked")
    parser.add_argument("job", metavar="JOB.toml", help="the job")
    add_set(parser, "data.length=512")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="how many, the first ones (default: 8)")
    parser.add_argument("--out", metavar="FILE", help="page to write, with the pictures in it")


def doctor(args: argparse.Namespace) -> Answer:
    """Findings, shapes, and a contact sheet."""
    from graft.studio.config import from_dict
    from graft.studio.errors import InputError
    from graft.studio.job import Job
    from graft.studio.registry import find

    out = Path(args.out) if args.out else None
    path = Path(args.path)
    if not path.exists():
        raise InputError(args.path, "there is no such folder or job file", "Give a folder of pictures, or a job file")
    if path.is_dir():
        config = from_dict(
            find("graft.diffusion:DataConfig", "diffusion"), {"path": str(path), **settings(args.set)}, "data"
        )
        words = (args.trigger,) if args.trigger else ()
        report = find("graft.diffusion.doctor:examine", "diffusion")(config, None, words, out)
    else:
        job = Job.load(path, args.set)
        if job.domain != "diffusion":
            reason = f"it is a job of the domain {job.domain}"
            raise InputError(args.path, reason, "Give a job of the domain diffusion, or a folder of pictures")
        report = find("graft.diffusion.doctor:examine_job", "diffusion")(job, args.trigger, out)
    return Answer(report.document(), report.text())


def caption(args: argparse.Namespace) -> Answer:
    """A text file beside every picture."""
    from graft.studio.registry import find

    write = find("graft.diffusion.captioner:write_captions", "diffusion")
    asked = {"prefix": args.prefix, "prompt": args.prompt, "max_tokens": args.max_tokens}
    rows = write(Path(args.path), args.model, asked, args.overwrite, args.device)
    written = sum(row["written"] for row in rows)
    lines = [f"{row['picture']}: {row['caption']}" for row in rows if row["written"]]
    kept = f"{written} captions written, {len(rows) - written} pictures had one"
    return Answer({"written": written, "kept": len(rows) - written, "pictures": rows}, "\n".join([*lines, kept]))


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
