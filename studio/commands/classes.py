"""`graft split` and `graft transfer`: which pictures are learnt from, and what becomes of new classes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, add_runs, add_set, command, table


def add(commands: Any) -> None:
    """Add the commands."""
    parser = command(commands, "split", split, "divide labelled pictures into parts, as a file for data.split")
    parser.add_argument("path", metavar="DATA", help="pictures in class folders, a table, arrays, or a built-in set")
    parser.add_argument("--test", type=float, default=0.2, metavar="SHARE", help="test share of a class (default: 0.2)")
    parser.add_argument("--validation", type=float, default=0.2, metavar="SHARE", help="of the rest (default: 0.2)")
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="labelled pictures of a class (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="names the choice of shots (default: 0)")
    parser.add_argument("--out", default="split.jsonl", metavar="FILE", help="the file (default: split.jsonl)")
    parser = command(commands, "transfer", transfer, "train on half of the classes and test on both halves")
    parser.add_argument("job", metavar="JOB.toml", help="the job")
    help = "trainings, each with the next seed; mean and spread are given (default: 1)"
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help=help)
    add_set(parser, "data.shots=16")
    add_runs(parser)


def split(args: argparse.Namespace) -> Answer:
    """A split file."""
    from graft.studio.disk import write_atomic
    from graft.studio.errors import InputError
    from graft.studio.labelled.built_in import NAMES
    from graft.studio.labelled.sources import LabelledConfig, open_source
    from graft.studio.labelled.splits import PARTS, make_split

    file = Path(args.out)
    if file.exists():
        raise InputError(str(file), "it exists, and results may rest on it", "Name another file with --out")
    where = {"dataset": args.path} if args.path in NAMES and not Path(args.path).exists() else {"path": args.path}
    shares = {key: getattr(args, key) for key in ("test", "validation", "shots", "seed")}
    config = LabelledConfig(**where, **shares)
    made = make_split(open_source(config), config)
    write_atomic(file, made.text.encode())
    counts = {part: len(made.part(part)) for part in PARTS}
    told = ", ".join(f"{count} {part}" for part, count in counts.items() if count)
    return Answer({"file": str(file), **counts}, f"{file}: {told}")


def transfer(args: argparse.Namespace) -> Answer:
    """Base classes, new classes, harmonic mean."""
    from graft.studio import registry
    from graft.studio.errors import InputError
    from graft.studio.job import Job

    job = Job.load(args.job, args.set)
    domain = registry.domain(job.domain)
    if not hasattr(domain, "base_to_new"):
        raise InputError(f"domain {job.domain!r}", "it has no classes", "Use a job of the domain vlm")
    result = domain.base_to_new(job, args.runs, args.seeds)
    rows = [{"": name, **result[name]} for name in ("zero_shot", "adapter")]
    rows += [{"": f"{name}, spread", **result[name]["spread"]} for name in ("zero_shot", "adapter") if args.seeds > 1]
    told = table(rows, ("", "base", "new", "harmonic_mean"))
    return Answer(result, "\n".join([*result.get("runs", [result.get("run")]), told]))
