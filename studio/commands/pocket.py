"""`graft pocket`."""

from __future__ import annotations

import argparse
from typing import Any

from graft.studio.commands import Answer, add_set, command, group, table


def add(commands: Any) -> None:
    """Add the commands."""
    inner = group(commands, "pocket", "the embedded models: list, export, train, report")
    command(inner, "list", list_, "list the embedded models")
    parser = command(inner, "export", export, "write a model as a standard folder of its library")
    parser.add_argument("name", metavar="NAME", help="such as pocket-sd")
    parser.add_argument("folder", metavar="DIR", help="a new folder")
    parser = command(inner, "train", train, "train one network of the embedded models, or go on with its run")
    parser.add_argument("network", metavar="NETWORK", help="autoencoder, clip, vit, unet or llava")
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run; one that exists is resumed")
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the recipe's")
    add_set(parser, "train.batch_size=32")
    parser = command(inner, "report", report, "measure the embedded models and write the report")
    parser.add_argument("--out", default="docs", metavar="DIR", help="folder of the report (default: docs)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="0 to N - 1 (default: 4)")


def list_(args: argparse.Namespace) -> Answer:
    """The models."""
    from graft.studio.pocket.commands import list_models

    rows = list_models()
    return Answer(rows, table(rows, ("name", "networks", "megabytes", "present", "hash")))


def export(args: argparse.Namespace) -> Answer:
    """One model as a folder."""
    from graft.studio.pocket.commands import export

    folder = export(args.name, args.folder)
    return Answer({"name": args.name, "folder": str(folder)}, f"{args.name} written to {folder}")


def train(args: argparse.Namespace) -> Answer:
    """One network."""
    from graft.studio.commands.train import outcome
    from graft.studio.pocket.commands import train

    run = train(args.network, run_dir=args.run_dir, steps=args.steps, overrides=args.set)
    text = f"{run.folder}: {run.status} at step {run.state['step']}"
    if run.status == "finished":
        return Answer(outcome(run), f"{text}; the weights are in the package\nNext: graft pocket report")
    return Answer(outcome(run), f"{text}\nNext: graft pocket train {args.network} --run-dir {run.folder}")


def report(args: argparse.Namespace) -> Answer:
    """The quality of the models."""
    from graft.studio.pocket.commands import report

    answer = report(args.out, args.seeds)
    rows = [
        {"model": model, "figure": name, "mean": round(sum(values) / len(values), 2)}
        for model, figures in answer["figures"].items()
        for name, values in figures.items()
    ]
    return Answer(answer, table(rows, ("model", "figure", "mean")) + f"\n{answer['page']}")
