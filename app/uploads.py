"""Pictures from a browser: counted, measured from their headers, decoded once, and written anew without anything else.

What is kept is a PNG of the pixels: no metadata, no place where something else could hide. Of an archive only pictures
are taken, after its table of contents was looked at.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Collection, Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

from graft.studio.disk import write_atomic
from graft.studio.errors import DataError
from graft.studio.pictures import BROKEN, SUFFIXES, checked_bytes, complaint, find_pictures, open_picture

MAX_FILES = 500
"""Pictures in a data set."""
MAX_BYTES = 64 << 20
"""Of one file."""
MAX_MEGAPIXELS = 50.0
"""Of one picture."""
MAX_SIDE = 4096
"""Larger pictures are kept at this size."""
MAX_RATIO = 100
"""Bytes out of an archive for each byte in it."""
LABEL = re.compile(r"[^\w -]+")


def add_files(folder: Path, files: Sequence[str | Path], label: str = "") -> list[str]:
    """Put uploaded pictures, and those of uploaded .zip files, into a data set; return what was refused, and why.

    Args:
        folder: of the data set.
        files: uploaded files.
        label: class of the pictures, for a classifier; in an archive the folders say it.
    """
    refused = []
    for file in map(Path, files):
        try:
            if file.suffix.lower() == ".zip":
                refused += add_archive(folder, file)
            else:
                add_picture(folder, file, label)
        except (DataError, *BROKEN) as error:
            told = error.reason if isinstance(error, DataError) else complaint(error)
            refused.append(f"{file.name}: {told}")
    return refused


def add_picture(folder: Path, file: Path, label: str = "", name: str = "") -> Path:
    """Write one picture into a data set as PNG; under a number, or under the name by which a table calls it.

    Raises:
        DataError: too many, too large, or a name of a class that no folder can have.
        OSError, ValueError: it is no sound picture.
    """
    if file.stat().st_size > MAX_BYTES:
        raise DataError(file.name, f"more than {MAX_BYTES >> 20} MB", "Give a smaller file")
    count = len(find_pictures(folder))
    if count >= MAX_FILES:
        raise DataError(file.name, f"the data set has {MAX_FILES} pictures already", "Leave some out")
    picture = open_picture(checked_bytes(file, MAX_MEGAPIXELS, "the limit of the studio"))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    data = BytesIO()
    picture.save(data, "PNG")
    if name:
        return write_atomic(folder / name, data.getvalue())
    named = folder / class_name(label) if label else folder
    numbers = [int(path.stem) for path in find_pictures(folder) if path.stem.isdigit()]
    return write_atomic(named / f"{max(numbers, default=0) + 1:04d}.png", data.getvalue())


def class_name(label: str) -> str:
    """A class as the name of a folder.

    Raises:
        DataError: nothing is left of it.
    """
    name = LABEL.sub(" ", label).strip(" -_")[:60].strip()
    if not name:
        raise DataError(f"class {label!r}", "it has no letter or digit", "Name the class in plain words")
    return name


def add_archive(folder: Path, file: Path) -> list[str]:
    """Put the pictures of a .zip file into a data set; return what was refused, and why.

    Raises:
        DataError: an archive that is too large once unpacked, or that names places outside itself.
    """
    refused = []
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in checked_entries(archive, file):
                label = PurePosixPath(entry.filename).parent.name
                draft = folder / f".entry{PurePosixPath(entry.filename).suffix.lower()}"
                with archive.open(entry) as opened:
                    data = opened.read(MAX_BYTES + 1)
                try:
                    draft.write_bytes(data)
                    add_picture(folder, draft, label)
                except (DataError, *BROKEN) as error:
                    told = error.reason if isinstance(error, DataError) else complaint(error)
                    refused.append(f"{entry.filename}: {told}")
                finally:
                    draft.unlink(missing_ok=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise DataError(file.name, f"it is no .zip file that can be read ({error})", "Pack it anew") from error
    return refused


def checked_entries(
    archive: zipfile.ZipFile, file: Path, suffixes: Collection[str] = SUFFIXES
) -> Iterator[zipfile.ZipInfo]:
    """Yield the pictures of an archive, or its files with these suffixes.

    Raises:
        DataError: it is a bomb, or has links or paths that lead out of it.
    """
    entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if len(entries) > 4 * MAX_FILES:
        raise DataError(file.name, f"it has {len(entries):,} entries", f"Pack at most {MAX_FILES} pictures")
    if size > MAX_RATIO * max(file.stat().st_size, 1) or size > 16 * MAX_BYTES:
        raise DataError(file.name, f"it would unpack to {size >> 20:,} MB", "Pack the pictures themselves")
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename or stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(file.name, f"its entry {entry.filename!r} leads out of it", "Pack it anew")
    for entry in entries:
        path = PurePosixPath(entry.filename)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if not entry.is_dir() and not hidden and path.suffix.lower() in suffixes:
            yield entry


def caption_of(picture: Path) -> str:
    """The caption beside a picture."""
    file = picture.with_suffix(".txt")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def set_caption(picture: Path, text: str) -> None:
    """Write the caption beside a picture; an empty one is taken away."""
    file = picture.with_suffix(".txt")
    if text.strip():
        write_atomic(file, text.strip()[:2000].encode())
    else:
        file.unlink(missing_ok=True)


def mask_file(picture: Path) -> Path:
    """Where the training of a diffusion model looks for a picture's mask."""
    return picture.with_name(f"{picture.stem}.mask.png")


def pictures(folder: Path) -> list[Path]:
    """The pictures of a data set, without the masks beside them."""
    return [path for path in find_pictures(folder) if not path.stem.endswith(".mask")]
