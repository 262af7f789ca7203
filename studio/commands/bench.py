"""`graft bench`, `graft demo` and `graft ui`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, add_runs, add_set, command, settings, table


def add(commands: Any) -> None:
    """Add the commands."""
    parser = command(commands, "bench", bench, "measure, side by side with what others do")
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one; without it, list them")
    parser.add_argument("--out", metavar="DIR", help="folder for the result as a file")
    add_set(parser, "rounds=3")
    parser = command(commands, "demo", demo, "teach the embedded model a new concept and write a report of it")
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder of the report (default: demo)")
    parser = command(commands, "ui", ui, "open the studio in a browser: teach, watch, preview, compare, keep")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    told = "address to listen on; any but this machine's own needs the token that is printed (default: 127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=told)
    parser.add_argument("--name", action="append", default=[], metavar="NAME", help="name to be reached by; repeatable")
    parser.add_argument("--data", metavar="DIR", help="folder of uploaded pictures (default: data beside the runs)")
    add_runs(parser)


def bench(args: argparse.Namespace) -> Answer:
    """One benchmark, or their names."""
    from graft.studio import registry
    from graft.studio.config import suggest
    from graft.studio.errors import InputError

    if args.name is None:
        names = sorted(registry.BENCHMARKS)
        return Answer(names, "\n".join(names))
    if args.name not in registry.BENCHMARKS:
        raise InputError(f"bench {args.name!r}", "there is no such benchmark", suggest(args.name, registry.BENCHMARKS))
    run = registry.find(registry.BENCHMARKS[args.name])
    changes = settings(args.set)
    known = run.__code__.co_varnames[: run.__code__.co_argcount + run.__code__.co_kwonlyargcount]
    for key in changes:
        if key not in known:
            raise InputError(f"--set {key}", "the benchmark has no such setting", suggest(key, known))
    result = run(Path(args.out) if args.out else None, **changes)
    return Answer(result, result.get("table") or _lines(result))


def _lines(result: Mapping[str, Any], indent: str = "") -> str:
    """A nested result as indented lines; lists of rows as tables."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", _lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}", table(value, list(value[0]))]
        else:
            lines.append(f"{indent}{key}: {value:.4g}" if isinstance(value, float) else f"{indent}{key}: {value}")
    return "\n".join(lines)


def demo(args: argparse.Namespace) -> Answer:
    """The demonstration."""
    from graft.studio.demo import run

    result = run(Path(args.out))
    return Answer(result, _lines(result))


def ui(args: argparse.Namespace) -> Answer:
    """The studio, until interrupted.

    Raises:
        InputError: gradio is not installed.
    """
    from importlib.util import find_spec

    from graft.studio.errors import InputError

    if find_spec("gradio") is None:
        raise InputError("graft ui", "the library 'gradio' is not installed", 'Run: pip install "graft-studio[app]"')
    from graft.app.server import serve

    serve(Path(args.runs), args.port, args.host, args.name, Path(args.data) if args.data else None)
    return Answer({"port": args.port})
