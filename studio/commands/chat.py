"""`graft chat`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from graft.studio.commands import Answer, add_runs, command, find_adapter, table
from graft.studio.commands.preview import load_base_of


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, "chat", chat, "ask about pictures, without an adapter and with it side by side")
    parser.add_argument("name", metavar="RUN_OR_ADAPTER", help="a run, or the folder or file of an adapter")
    parser.add_argument("pictures", metavar="PICTURE", nargs="*", help="shown with the first question")
    parser.add_argument(
        "--ask", action="append", metavar="TEXT", help="a question; repeatable, as one conversation (default: asks you)"
    )
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="most tokens of an answer (default: 32)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw answers; 0 takes the likeliest (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--base", metavar="NAME", help="instead of the base that the adapter names")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add_runs(parser)


def chat(args: argparse.Namespace) -> Answer:
    """A conversation, twice."""
    from graft.studio import registry
    from graft.studio.errors import InputError

    adapter, _ = find_adapter(args.name, args.runs)
    domain = registry.domain(adapter.card.domain) if adapter.card.domain else None
    if not hasattr(domain, "chat"):
        raise InputError(
            "graft chat", f"an adapter of {adapter.card.domain or 'no domain'} does not talk", "Use graft preview"
        )
    base = load_base_of(adapter, args.base, args.device)
    asked, rows = list(args.ask or ()), list[dict[str, str]]()
    config = domain.PreviewConfig(tokens=args.tokens, temperature=args.temperature)  # type: ignore[union-attr]
    how = (config.tokens, config.drawing(args.seed))
    if asked:
        rows = domain.chat(base, adapter, args.pictures, asked, *how)  # type: ignore[union-attr]
        return Answer(rows, table(rows, ("question", "base", "adapter")))
    print("Ask; an empty line ends.", file=sys.stderr)
    while question := sys.stdin.readline().strip():
        asked.append(question)
        rows = domain.chat(base, adapter, args.pictures, asked, *how)  # type: ignore[union-attr]
        print(f"without: {rows[-1]['base']}\nwith:    {rows[-1]['adapter']}", file=sys.stderr)
    return Answer(rows, table(rows, ("question", "base", "adapter")))
