"""Rewrites the tables of `docs/*.md` that are made from the code (`make docs`).

A table stands between `<!-- fields module:Class -->` and `<!-- end -->`; it lists the fields of a dataclass with their
defaults and the text under each.
"""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from graft.studio.config import field_docs

BLOCK = re.compile(r"(?P<head><!-- fields (?P<place>\S+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as it is written in TOML."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def table(cls: Any) -> str:
    """The fields of a dataclass as a Markdown table."""
    docs = field_docs(cls)
    rows = [
        f"| `{field.name}` | {default(field)} | {' '.join(docs[field.name].split()).replace('|', chr(92) + '|')} |"
        for field in dataclasses.fields(cls)
        if field.init
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def rewritten(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        module, name = match["place"].split(":")
        return match["head"] + table(getattr(import_module(module), name))

    return BLOCK.sub(fill, text)


if __name__ == "__main__":
    for page in sorted(Path(__file__).parent.glob("*.md")):
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
