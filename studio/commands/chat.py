"""`graft chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from graft.studio.commands import Answer, add_runs, command, find_adapter, table
from graft.studio.commands.preview import load_base_of

Rows = list[dict[str, Any]]


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, "chat", chat, "ask about pictures, without an adapter and with it side by side")
    parser.add_argument("name", metavar="RUN_OR_ADAPTER", help="a run, or the folder or file of an adapter")
    parser.add_argument("pictures", metavar="PICTURE", nargs="*", help="shown with the first question")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="RUN_OR_ADAPTER",
        help="another one; repeatable. The one that finds a question least surprising answers it, beside no base",
    )
    parser.add_argument(
        "--ask", action="append", metavar="TEXT", help="a question; repeatable, as one conversation (default: asks you)"
    )
    parser.add_argument("--data", metavar="FILE", help="instead: the questions of a file, as data.path, each by itself")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="most tokens of an answer (default: 32)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw answers; 0 takes the likeliest (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--base", metavar="NAME", help="instead of the base that the adapter names")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add_runs(parser)


def chat(args: argparse.Namespace) -> Answer:
    """A conversation: twice, or with an adapter that is chosen for each question."""
    from graft.studio import registry
    from graft.studio.errors import InputError

    adapters = {name: find_adapter(name, args.runs)[0] for name in (args.name, *args.adapter)}
    adapter = adapters[args.name]
    for each in adapters.values():
        domain: Any = registry.domain(each.card.domain) if each.card.domain else None
        if not hasattr(domain, "chat"):
            reason = f"an adapter of {each.card.domain or 'no domain'} does not talk"
            raise InputError("graft chat", reason, "Use graft preview")
    base = load_base_of(adapter, args.base, args.device)
    if args.data:
        if args.ask or args.pictures:
            raise InputError(
                f"--data {args.data}", "the file has pictures and questions", "Leave out PICTURE and --ask"
            )
        return _of_file(domain.file_by_perplexity(base, adapters, args.data, args.tokens))
    if len(adapters) > 1:
        if args.temperature:
            reason = "the answer of the adapter that perplexity chooses is the likeliest one"
            raise InputError(f"--temperature {args.temperature}", reason, "Leave it out, or give one adapter")
        columns = ("question", "chosen", "answer")
        ask = partial(domain.chat_by_perplexity, base, adapters, args.pictures, tokens=args.tokens)
        return _talk(args.ask, ask, columns)
    config = domain.PreviewConfig(tokens=args.tokens, temperature=args.temperature)
    drawing = config.drawing(args.seed)
    ask = partial(domain.chat, base, adapter, args.pictures, tokens=config.tokens, drawing=drawing)
    return _talk(args.ask, ask, ("question", "base", "adapter"))


def _talk(asked: Sequence[str] | None, ask: Callable[[Sequence[str]], Rows], columns: Sequence[str]) -> Answer:
    """The answers to what was asked, or to what is typed until an empty line."""
    if asked:
        rows = ask(asked)
        return Answer(rows, table(rows, columns))
    typed, rows = list[str](), Rows()
    print("Ask; an empty line ends.", file=sys.stderr)
    while question := sys.stdin.readline().strip():
        typed.append(question)
        rows = ask(typed)
        print("\n".join(f"{column}: {rows[-1][column]}" for column in columns[1:]), file=sys.stderr)
    return Answer(rows, table(rows, columns))


def _of_file(rows: Rows) -> Answer:
    """The answers to the questions of a file, how many are right, and who gave how many."""
    chosen = [row["chosen"] for row in rows]
    exact = sum(row["answer"] == row["right"] for row in rows) / len(rows)
    counts = {name: chosen.count(name) for name in dict.fromkeys(chosen)}
    text = table(rows, ("question", "chosen", "answer", "right"))
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    document = {"rows": rows, "exact": exact, "chosen": counts}
    return Answer(document, f"{text}\n\n{exact:.3f} of {len(rows)} right; answered by: {told}")
