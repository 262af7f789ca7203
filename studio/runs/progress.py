"""Progress on standard error: a bar for people, a line now and then for files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Show = Callable[[int, Mapping[str, float]], None]
SECONDS = 10.0
"""Between two lines where there is no terminal."""


@contextmanager
def progress(name: str, done: int, total: int, visible: bool) -> Iterator[Show]:
    """Yield a function that takes the steps done and the newest figures."""
    if not visible:
        yield lambda step, figures: None
    elif sys.stderr.isatty():
        with _bar(name, done, total) as show:
            yield show
    else:
        yield _lines(name, total)


@contextmanager
def _bar(name: str, done: int, total: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        Remaining(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done, figures="")
        yield lambda step, figures: bar.update(task, completed=step, figures=_text(figures))


def _lines(name: str, total: int) -> Show:
    last = 0.0

    def show(step: int, figures: Mapping[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS or step == total:
            last = time.monotonic()
            print(f"{name}  {step}/{total}  {_text(figures)}", file=sys.stderr, flush=True)

    return show


def _text(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "step")
