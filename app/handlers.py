"""What every handler of a page does with an error: the page shows the message, the log of the server stays quiet."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from html import escape
from typing import Any, TypeVar

import gradio as gr
from gradio.context import Context

from graft.studio.errors import GraftError

F = TypeVar("F", bound=Callable[..., Any])
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that only read or are done at once: one request each, nothing waits for them."""


def told(handler: F) -> F:
    """Shows our own errors as a message; Gradio takes it for HTML, and a name or a word in it may be anyone's."""

    @wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except GraftError as error:
            raise gr.Error(escape(str(error)), print_exception=False, title="That did not work") from None

    return guarded  # type: ignore[return-value]


def changed(values: list[Any], seen: list[str]) -> tuple[list[Any], list[str]]:
    """Leaves out what the page shows already; returns what to send, and what the page will then show."""
    # What a component was made with says what it will show; itself it is another object each time.
    told_now = [str(getattr(value, "_constructor_args", [value])[0]) for value in values]
    kept = [gr.skip() if now == before else value for value, now, before in zip(values, told_now, seen, strict=True)]
    return kept, told_now


def note(text: str) -> str:
    """A line in small print; links in it are our own."""
    return f'<div class="graft"><p class="soft">{text}</p></div>'


def current_page() -> gr.Blocks:
    """The page that is being drawn."""
    page = Context.root_block
    assert isinstance(page, gr.Blocks)
    return page
