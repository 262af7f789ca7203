"""`graft split` and `graft transfer`: which pictures are learnt from, and what becomes of new classes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, add_runs, add_set, command, table


def add(commands: Any) -> None:
    """Add the commands."""
    parser = command(commands, "split", split, "divide a folder of class folders into training and test pictures")
    parser.add_argument("path", metavar="DIR", help="a folder with a folder of pictures for each class")
    parser.add_argument("--test", type=float, default=0.5, metavar="SHARE", help="test share of a class (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="names the choice (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="JSONL file (default: splits.jsonl in the folder)")
    parser = command(commands, "transfer", transfer, "train on half of the classes and test on both halves")
    parser.add_argument("job", metavar="JOB.toml", help="the job")
    add_set(parser, "data.shots=16")
    add_runs(parser)


def split(args: argparse.Namespace) -> Answer:
    """A file of splits."""
    from graft.studio.errors import InputError
    from graft.studio.registry import find

    file = Path(args.out or Path(args.path) / "splits.jsonl")
    if file.exists():
        raise InputError(str(file), "it exists, and results may rest on it", "Name another file with --out")
    if not 0 < args.test < 1:
        raise InputError(f"--test {args.test}", "expected a share between 0 and 1", "Use 0.5")
    config = find("graft.vlm.data:DataConfig", "vlm")(path=args.path, seed=args.seed)
    counts = find("graft.vlm.data:write_splits", "vlm")(config, args.test, file)
    told = ", ".join(f"{count} {part}" for part, count in counts.items())
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
    result = domain.base_to_new(job, args.runs)
    rows = [{"": name, **result[name]} for name in ("zero_shot", "adapter")]
    return Answer(result, f"{result['run']}\n{table(rows, ('', 'base', 'new', 'harmonic_mean'))}")
