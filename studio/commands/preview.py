"""`graft preview` and `graft eval`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.commands import Answer, add_runs, add_set, command, find_adapter, settings, table

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run


def add(commands: Any) -> None:
    """Add the commands."""
    parser = command(commands, "preview", preview, "draw pictures with an adapter, and without it beside them")
    _common(parser, "steps=25")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help='with "{token}" for the concept; repeatable')
    parser.add_argument("--seed", action="append", type=int, metavar="N", help="one picture each; repeatable")
    parser.add_argument("--out", default="preview", metavar="DIR", help="folder of the pictures (default: preview)")
    parser = command(commands, "eval", evaluate, "measure an adapter beside its base")
    _common(parser, "seeds=4")
    parser.add_argument("--data", metavar="DIR", help="real pictures to compare with (default: those of the run)")


def _common(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("name", metavar="RUN_OR_ADAPTER", help="a run, or the folder or file of an adapter")
    parser.add_argument("--base", metavar="NAME", help="instead of the base that the adapter names")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add_set(parser, example)
    add_runs(parser)


def load_base_of(adapter: Adapter, name: str | None, device: str | None = None) -> Any:
    """Return the base of an adapter, or the one that was named instead.

    Raises:
        InputError: neither is known.
    """
    from graft.studio.errors import InputError
    from graft.studio.registry import load_base

    name = name or adapter.card.base
    if not name:
        raise InputError("the adapter", "its file does not name its base", "Give --base NAME")
    return load_base(name, device, domain=adapter.card.domain)


def preview(args: argparse.Namespace) -> Answer:
    """Pictures with and without."""
    from graft.studio.config import from_dict

    adapter, run = find_adapter(args.name, args.runs)
    base = load_base_of(adapter, args.base, args.device)
    domain = _domain(base)
    config = from_dict(domain.PreviewConfig, settings(args.set), "preview")
    word = adapter.card.trigger or ""
    prompts = [prompt.replace("{token}", word) for prompt in args.prompt or _prompts(run)]
    files = domain.preview(base, adapter, prompts, args.seed or [0, 1, 2, 3], Path(args.out), config)
    document = {"files": [str(path) for path in files], "prompts": prompts}
    return Answer(document, f"{files[0]}  and {len(files) - 1} more")


def _prompts(run: Run | None) -> list[str]:
    sampled = list(run.job.sample.prompts) if run is not None else []
    return sampled or ["a photo of {token}", "{token} on a blue background"]


def evaluate(args: argparse.Namespace) -> Answer:
    """Figures with and without."""
    from graft.studio.config import from_dict
    from graft.studio.errors import InputError

    adapter, run = find_adapter(args.name, args.runs)
    data = args.data or (run.job.data["path"] if run is not None else None)
    if data is None:
        raise InputError(args.name, "an adapter alone does not know its pictures", "Give --data DIR")
    base = load_base_of(adapter, args.base, args.device)
    domain = _domain(base)
    known = {field.name for field in dataclasses.fields(domain.EvaluationConfig)}
    told = {key: value for key, value in (run.job.data if run is not None else {}).items() if key in known}
    config = from_dict(domain.EvaluationConfig, {**told, "path": str(data), **settings(args.set)}, "eval")
    figures = {"base": domain.evaluate(base, None, config), "adapter": domain.evaluate(base, adapter, config)}
    rows = [{"": name, **values} for name, values in figures.items()]
    return Answer(figures, table(rows, ("", *figures["base"])))


def _domain(base: Any) -> Any:
    from graft.studio import registry

    return registry.domain(base.domain)
