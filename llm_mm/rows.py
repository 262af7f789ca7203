"""Rows as the model reads them, token by token in colour: green is learnt, grey is read only, blue is a picture."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.llm_mm.base import load_base
from graft.llm_mm.conversations import IGNORED, Conversation, Tokens
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.task import Reader
from graft.studio.config import from_dict, require
from graft.studio.errors import DataError

if TYPE_CHECKING:
    from graft.studio.job import Job

_ANSI = {"learnt": "\033[1;32m", "masked": "\033[2m", "image": "\033[34m"}
_END = "\033[0m"
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What is learnt</title>
<style>
body {{ font: 15px/1.7 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
img {{ height: 128px; margin-right: 8px; image-rendering: pixelated; }}
span {{ padding: 1px 2px; margin: 1px; border-radius: 3px; white-space: pre-wrap; }}
.learnt {{ background: #b7e4b0; }} .masked {{ background: #eee; color: #555; }} .image {{ background: #bcd7f5; }}
section {{ border-top: 1px solid #ccc; padding: 1em 0; }}
</style>
<h1>What is learnt</h1>
<p><span class="learnt">learnt</span> <span class="masked">read only</span> <span class="image">picture</span></p>
{rows}
</html>
"""


@dataclass(frozen=True)
class Shown:
    """Rows for a terminal, as a page, and as data."""

    text: str
    """With colours of a terminal."""
    body: str
    """HTML of the rows: a section for each, with spans of the classes learnt, masked and image, and its pictures."""
    rows: list[dict[str, Any]]
    """Runs of tokens of one kind."""

    @property
    def page(self) -> str:
        """A page that needs no other file."""
        return _PAGE.format(rows=self.body)


def show_rows(job: Job, count: int = 8) -> Shown:
    """Returns the first rows that a job would be trained on; of one that it would refuse, why.

    Raises:
        InputError: anything wrong with base or data.
    """
    require("rows", count, count >= 1, "1 or more")
    data = from_dict(DataConfig, dict(job.data), "data")
    rows = read_rows(data).train[:count]
    reader = Reader.of(load_base(job.base, "cpu"), data)
    text, page, told = [], [], []
    for row in rows:
        try:
            tokens = reader.tokens(row)
            shown = _images(reader, row)
        except DataError as error:
            why = str(error).removeprefix(f"row {row.number}: ")
            text.append(_plain(f"row {row.number} cannot be used: {why}"))
            page.append(f"<section><h2>row {row.number} cannot be used</h2><p>{html.escape(why)}</p></section>")
            told.append({"row": row.number, "problem": why})
            continue
        runs = _runs(reader, tokens)
        learnt = sum(label != IGNORED for label in tokens.labels)
        pictures = f"{len(row.pictures)} picture{'s' * (len(row.pictures) != 1)}"
        head = f"row {row.number}: {len(tokens.ids)} tokens, {learnt} learnt, {pictures}"
        head += f", {tokens.dropped} answers dropped" if tokens.dropped else ""
        text.append(head + "\n" + "".join(f"{_ANSI[kind]}{_plain(piece)}{_END}" for kind, piece, _ in runs))
        spans = "".join(
            f'<span class="{kind}" title="{_title(ids)}">{html.escape(piece)}</span>' for kind, piece, ids in runs
        )
        page.append(f"<section><h2>{head}</h2><p>{shown}</p><p>{spans}</p></section>")
        told.append(
            {"row": row.number, "tokens": len(tokens.ids), "learnt": learnt, "runs": [list(run[:2]) for run in runs]}
        )
    return Shown("\n\n".join(text), "\n".join(page), told)


def _plain(piece: str) -> str:
    """A token without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)


def _runs(reader: Reader, tokens: Tokens) -> list[tuple[str, str, list[int]]]:
    """Tokens by kind: each of text by itself, those of a picture together."""
    runs = list[tuple[str, str, list[int]]]()
    image, spell = reader.writer.image_id, reader.writer.tokenizer
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        kind = "image" if token == image else "masked" if label == IGNORED else "learnt"
        if kind == "image" and runs and runs[-1][0] == "image":
            ids = [*runs[-1][2], token]
            runs[-1] = (kind, f"[picture, {len(ids)} tokens]", ids)
        else:
            runs.append((kind, "[picture]" if kind == "image" else spell.decode([token]) or "·", [token]))
    return runs


def _title(ids: list[int]) -> str:
    return f"{len(ids)} x {ids[0]}" if len(ids) > 1 else str(ids[0])


def _images(reader: Reader, row: Conversation) -> str:
    """The row's pictures, in the page itself."""
    shown = []
    for picture in row.pictures:
        small, buffer = reader.store.open(picture), io.BytesIO()
        small.thumbnail((384, 384))
        small.save(buffer, "PNG")
        shown.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    return "".join(shown)
