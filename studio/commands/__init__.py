"""The commands, one file per group: each adds its arguments, and imports what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run

RUNS = "runs"
"""Folder of the runs, unless `--runs` names another."""


@dataclass(frozen=True)
class Answer:
    """What a command has to say."""

    document: Any
    """For `--json`."""
    text: str = ""
    """For people."""
    code: int = 0
    """Exit code."""


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str
) -> argparse.ArgumentParser:
    """Add a command and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.set_defaults(run=run)
    return parser


def group(commands: Any, name: str, help: str) -> Any:
    """Add a command that has commands of its own and return their list."""
    return commands.add_parser(name, help=help, description=help).add_subparsers(metavar="COMMAND", required=True)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add `--runs`."""
    parser.add_argument("--runs", default=RUNS, metavar="DIR", help=f"folder of the runs (default: {RUNS})")


def add_set(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `--set`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"change one setting, such as {example}"
    )


def settings(changes: Sequence[str]) -> dict[str, Any]:
    """Return what `--set` gave, for settings without sections.

    Raises:
        InputError: not of the form key=value.
    """
    from graft.studio.config import parse_value
    from graft.studio.errors import InputError

    pairs = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}", "it is not of the form key=value", "Write --set steps=50")
        pairs[key.strip()] = parse_value(value.strip())
    return pairs


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as aligned text under the columns' names."""
    cells = [list(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def cell(value: Any) -> str:
    """Return a value as text: four digits of a number, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def find_adapter(name: str, runs: str | Path, head_dim: int | None = None) -> tuple[Adapter, Run | None]:
    """Return the adapter behind a path or a run's id, and the run if it is one; `head_dim` is as in `load_adapter`.

    Raises:
        InputError: neither a run with a result nor an adapter.
    """
    from pathlib import Path

    from graft.studio.adapter import load_adapter
    from graft.studio.runs import find_run

    path = Path(name)
    if path.exists() and not (path / "job.toml").is_file():
        return load_adapter(path, head_dim), None
    run = find_run(name, runs)
    return run.adapter(), run
