"""What became of a batch: rows for a table, CSV and JSON, and a sheet of pictures."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.disk import write_atomic, write_json

if TYPE_CHECKING:
    from PIL import Image

    from graft.studio.batch.plan import Batch

COLUMNS = ("row", "subject", "method", "status", "step", "steps", "loss", "seconds", "message", "run", "result")
TILE, LABEL = 144, 22
"""Pixels of a picture, and of the text under it."""


def rows(batch: Batch) -> list[dict[str, Any]]:
    """One row for each entry, as its run is now."""
    found = []
    for entry, run in zip(batch.entries, batch.runs, strict=True):
        state, status = run.state, run.status
        last = run.metrics()[-1:] if status == "finished" else []
        figures = {key: last[0].get(key) for key in ("loss", "seconds")} if last else {}
        if not figures and status == "finished":
            lead = run.group[0].metrics()[-1:]
            figures = {key: lead[0].get(key) for key in ("loss", "seconds")} if lead else {}
        found.append(
            {
                "row": entry.row,
                "subject": entry.subject,
                "method": entry.method,
                "status": status,
                "step": state.get("step"),
                "steps": state.get("steps"),
                "loss": figures.get("loss"),
                "seconds": figures.get("seconds"),
                "failure": state.get("failure") or None,
                "message": state.get("message") or None,
                "run": run.id,
                "result": str(run.folder / "result") if (run.folder / "result").exists() else None,
            }
        )
    return found


def counts(batch: Batch) -> dict[str, int]:
    """Statuses and how many runs have each."""
    found: dict[str, int] = {}
    for run in batch.runs:
        found[run.status] = found.get(run.status, 0) + 1
    return found


def write_summary(batch: Batch) -> dict[str, Any]:
    """Write `summary.csv`, `summary.json` and `sheet.png` into the batch's folder; return the summary."""
    table = rows(batch)
    document = {
        "name": batch.name,
        "folder": str(batch.folder),
        "counts": counts(batch),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "runs": table,
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in row.items()} for row in table)
    write_atomic(batch.folder / "summary.csv", text.getvalue().encode())
    write_json(batch.folder / "summary.json", document)
    write_sheet(batch, batch.folder / "sheet.png")
    return document


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def write_sheet(batch: Batch, path: Path) -> Path:
    """Draw a row for each subject: one of its pictures, then what each method made of it."""
    from PIL import Image, ImageDraw

    subjects = list(dict.fromkeys(entry.subject for entry in batch.entries))
    methods = list(dict.fromkeys(entry.method for entry in batch.entries))
    size = (TILE * (len(methods) + 1), (TILE + LABEL) * len(subjects))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for entry, run in zip(batch.entries, batch.runs, strict=True):
        top = (TILE + LABEL) * subjects.index(entry.subject)
        left = TILE * (methods.index(entry.method) + 1)
        pen.text((4, top + TILE + 4), entry.subject[:22], "black")
        pen.text((left + 4, top + TILE + 4), f"{entry.method[:16]}: {run.status}", _ink(run.status))
        _paste(sheet, _first_picture(entry.job.data.get("path")), (0, top))
        _paste(sheet, next(iter(sorted((run.folder / "result").glob("preview.*"))), None), (left, top))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return write_atomic(path, data.getvalue())


def _ink(status: str) -> str:
    return {"finished": "black", "failed": "#b00020"}.get(status, "#666666")


def _first_picture(folder: Any) -> Path | None:
    from graft.studio.pictures import find_pictures

    try:
        return find_pictures(Path(folder))[0] if isinstance(folder, str) and folder else None
    except Exception:  # the run has told what is wrong with it
        return None


def _paste(sheet: Image.Image, path: Path | None, corner: tuple[int, int]) -> None:
    from PIL import Image, ImageOps

    if path is None:
        return
    try:
        with Image.open(path) as image:
            if image.width * image.height > 50_000_000:
                return
            tile = ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), (TILE - 8, TILE - 8))
    except (OSError, ValueError, Image.DecompressionBombError):
        return
    sheet.paste(tile, (corner[0] + (TILE - tile.width) // 2, corner[1] + (TILE - tile.height) // 2))
