"""What a preview has shown, as a table, and the folders of its pictures."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from graft.app import page, uploads
from graft.app.files import shown_url
from graft.app.place import Place
from graft.studio.errors import InputError

KEPT = 20
"""Previews whose pictures stay on disk."""


def safe_pictures(place: Place, files: Sequence[str] | None) -> list[Path]:
    """Uploaded pictures, written anew.

    Raises:
        InputError: a file is no picture, or too large.
    """
    if not files:
        return []
    folder = new_folder(place)
    refused = uploads.add_files(folder, files[:24])
    if refused:
        raise InputError(f"{len(refused)} files", "; ".join(refused[:3]), "Leave them out")
    return sorted(folder.glob("*.png"))


def new_folder(place: Place) -> Path:
    """A folder for the pictures of one preview; the oldest ones go."""
    root = place.work / "shown"
    root.mkdir(parents=True, exist_ok=True)
    for old in sorted(root.iterdir(), key=lambda path: path.stat().st_mtime)[: -2 * KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    folder = root / secrets.token_hex(8)
    folder.mkdir()
    return folder


def table(place: Place, cells: Sequence[dict[str, Any]]) -> str:
    """Rows by columns: pictures, or bars of classes."""
    rows, columns = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("row", "column"))
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        found = {cell["column"]: cell for cell in cells if cell["row"] == row}
        picture = next((cell["picture"] for cell in found.values() if cell["shares"]), "")
        name = drawn(place, picture, row) if picture else f"{escape(row)}"
        filled = "".join(
            f"<td>{content(place, found[column])}</td>" if column in found else "<td></td>" for column in columns
        )
        lines.append(f"<tr><th scope=row>{name}</th>{filled}</tr>")
    return (
        f'<div class="graft" id="shown"><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def content(place: Place, cell: dict[str, Any]) -> str:
    """One cell: bars, a picture with words, or words."""
    if cell["shares"]:
        return page.bars(cell["shares"])
    if cell["picture"]:
        return drawn(place, cell["picture"], cell["text"])
    return f'<p class="said">{escape(cell["text"])}</p>'


def drawn(place: Place, file: str, caption: str) -> str:
    """A picture of a preview."""
    return page.picture(caption, Path(file), shown_url(place.work, Path(file)))
