"""The `graft` command. Each command takes `--json`: one document on standard output, progress on standard error.

Exit codes: 0 done, 1 failed, 2 bad input. Nothing heavy is imported before the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import graft
from graft.studio.commands import Answer
from graft.studio.disk import is_full
from graft.studio.errors import GraftError, InputError

MODULES = (
    "doctor",
    "methods",
    "pocket",
    "data",
    "train",
    "batch",
    "runs",
    "preview",
    "chat",
    "adapters",
    "classes",
    "bench",
)
"""Files of `studio/commands`, in the order of the help."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other bad input is reported."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        from graft.studio.config import suggest

        remedy = f"See {self.prog} --help"
        wrong = re.match(r"argument (.*): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            what, given, choices = wrong.groups()
            raise InputError(
                f"{what} {given!r}", "there is no such choice", suggest(given, re.findall(r"[\w-]+", choices))
            )
        raise InputError(self.prog, message, remedy)


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="graft", description="Adapt frozen foundation models and preview the result.")
    parser.add_argument("--version", action="version", version=f"graft {graft.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in MODULES:
        import_module(f"graft.studio.commands.{name}").add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in argv
    try:
        args = build_parser().parse_args(argv)
        with redirect_stdout(sys.stderr):  # what libraries print is no part of the answer
            answer: Answer = args.run(args)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, as_json)
    # With `accelerate launch` every process runs this program; the first one speaks for all.
    if os.environ.get("RANK", "0") == "0":
        _print(json.dumps(answer.document, ensure_ascii=False, default=str) if as_json else answer.text)
    return answer.code


def _report(error: BaseException, as_json: bool) -> int:
    """Tell what went wrong, in one message, and return the exit code."""
    code, message = 1, str(error) or type(error).__name__
    facts: dict[str, Any] = {}
    if isinstance(error, GraftError):
        code = error.exit_code
        facts = {key: getattr(error, key) for key in ("given", "reason", "remedy") if hasattr(error, key)}
    elif isinstance(error, OSError) and (is_full(error) or isinstance(error, PermissionError)):
        code, message = (
            2,
            f"{error.filename or 'the disk'}: {error.strerror}. Free some space, or choose another folder",
        )
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif not isinstance(error, OSError):
        traceback.print_exception(error)  # our own mistake: the place matters
    if as_json:
        _print(json.dumps({"error": {"type": type(error).__name__, "message": message, **facts}}, ensure_ascii=False))
    print(f"graft: {message}", file=sys.stderr)
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
