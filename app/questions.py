"""Questions about pictures as data: a table from a browser, pictures under the names that it has for them, and its rows
as the model will read them.

A data set of this kind is a folder with one table, which is where `[data]` of the domain looks for it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from graft.app import uploads
from graft.app.handlers import note
from graft.app.place import Place
from graft.studio.disk import write_atomic
from graft.studio.errors import DataError, InputError
from graft.studio.pictures import BROKEN, SUFFIXES, complaint, find_pictures

TABLES = {".csv": "questions.csv", ".jsonl": "data.jsonl", ".json": "data.json"}
"""Suffix of an uploaded table -> its name in a data set."""
MAX_TABLE = 16 << 20
"""Bytes of a table."""
MAX_NAME = 200
"""Characters of a picture's path in a data set."""
ROWS = 8
"""Rows shown as tokens."""
HOW_TO = (
    "Drop a .zip of pictures with a table, or the pictures and the table themselves. The table is a .csv with the "
    "columns <code>image,question,answer</code>, or .jsonl or .json as LLaVA, ShareGPT, OpenAI and Alpaca have it."
)


def add_files(folder: Path, files: Sequence[str | Path]) -> list[str]:
    """Put an uploaded table and uploaded pictures, or .zip files of them, into a data set; return what was refused.

    Args:
        folder: of the data set; a table that it has is replaced.
        files: uploaded files.
    """
    refused = []
    for file in map(Path, files):
        try:
            if file.suffix.lower() == ".zip":
                refused += _add_archive(folder, file)
            elif file.suffix.lower() in TABLES:
                with file.open("rb") as opened:
                    _add_table(folder, file.name, opened.read(MAX_TABLE + 1))
            else:
                uploads.add_picture(folder, file, name=picture_name(file.name))
        except (DataError, *BROKEN) as error:
            refused.append(f"{file.name}: {error.reason if isinstance(error, DataError) else complaint(error)}")
    return refused


def picture_name(name: str) -> str:
    """The path of a picture in a data set, as its table has it.

    Raises:
        DataError: no file may have it.
    """
    parts = PurePosixPath(name).parts
    plain = name.isprintable() and len(name) <= MAX_NAME and not set(name) & set('\\:<>|"?*')
    if not plain or not parts or name.startswith("/") or any(part.startswith(".") for part in parts):
        raise DataError(name, "no picture of a data set can have this name", "Name it in plain letters")
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        raise DataError(name, "it is no picture and no table", f"Known: {', '.join(sorted(SUFFIXES | set(TABLES)))}")
    return "/".join(parts)


def table_of(folder: Path) -> Path | None:
    """The table of a data set."""
    return next((folder / name for name in TABLES.values() if (folder / name).is_file()), None)


def _add_table(folder: Path, name: str, data: bytes) -> None:
    if len(data) > MAX_TABLE:
        raise DataError(name, f"more than {MAX_TABLE >> 20} MB", "Leave rows out")
    old, new = table_of(folder), folder / TABLES[Path(name).suffix.lower()]
    write_atomic(new, data)
    if old is not None and old != new:
        old.unlink()


def _add_archive(folder: Path, file: Path) -> list[str]:
    """Pictures are named from where the table lies."""
    refused = []
    try:
        with zipfile.ZipFile(file) as archive:
            entries = list(uploads.checked_entries(archive, file, SUFFIXES | set(TABLES)))
            tables = [entry for entry in entries if PurePosixPath(entry.filename).suffix.lower() in TABLES]
            if len(tables) > 1:
                told = ", ".join(entry.filename for entry in tables[:4])
                raise DataError(file.name, f"it has {len(tables)} tables: {told}", "Leave one")
            root = PurePosixPath(tables[0].filename).parent if tables else PurePosixPath()
            for entry in entries:
                try:
                    _add_entry(folder, archive, entry, root)
                except (DataError, *BROKEN) as error:
                    told = error.reason if isinstance(error, DataError) else complaint(error)
                    refused.append(f"{entry.filename}: {told}")
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise DataError(file.name, f"it is no .zip file that can be read ({error})", "Pack it anew") from error
    return refused


def _add_entry(folder: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, root: PurePosixPath) -> None:
    path = PurePosixPath(entry.filename)
    with archive.open(entry) as opened:
        data = opened.read(uploads.MAX_BYTES + 1)
    if path.suffix.lower() in TABLES:
        _add_table(folder, path.name, data)
        return
    name = picture_name(str(path.relative_to(root) if path.is_relative_to(root) else path))
    draft = folder / f".entry{path.suffix.lower()}"
    try:
        draft.write_bytes(data)
        uploads.add_picture(folder, draft, name=name)
    finally:
        draft.unlink(missing_ok=True)


def listing(folder: Path) -> str:
    """What there is, in a line."""
    table, pictures = table_of(folder), len(find_pictures(folder))
    count = f"{pictures} picture{'s' * (pictures != 1)}"
    return f'<div class="graft"><p>{count} and {table.name if table else "no table yet"}.</p></div>'


def checked(folder: Path) -> None:
    """Refuse a data set without a table; what stands in it is checked with the base.

    Raises:
        InputError: there is none.
    """
    if table_of(folder) is None:
        raise InputError("Questions", "there is no table", "Drop a .csv with the columns image, question, answer")


def shown(place: Place, job: Mapping[str, Any]) -> str:
    """The first rows that a job trains on, token by token, as `graft data preview` shows them.

    Raises:
        InputError: anything wrong with base or data.
    """
    legend = (
        '<p><span class="learnt">learnt</span> <span class="masked">read only</span> '
        '<span class="image">picture</span></p>'
    )
    rows = place.models.ask("rows", job=job, count=ROWS)
    same = note("The same as <code>graft data preview job.toml</code>.")
    return f'{same}<div class="graft labels" id="labels">{legend}{rows}</div>'
