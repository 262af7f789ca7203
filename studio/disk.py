"""Files that are whole or absent, lines that are whole or absent, and a full disk told from other failures."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.studio.errors import DiskFullError, InputError

# EFBIG is the limit that a batch system or `ulimit -f` sets: for the user it is a full disk of their own.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = "Free some space, or choose a folder on another disk"


def is_full(error: OSError) -> bool:
    """Tell whether an operation failed for want of space."""
    return error.errno in _FULL


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's error into ours.

    Raises:
        DiskFullError: something inside ran out of space.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise DiskFullError(str(path), f"there is no space left ({error.strerror})", _REMEDY) from error


def require_space(folder: Path, size: int) -> None:
    """Check that so many bytes can be written below a folder, which need not exist yet.

    Raises:
        DiskFullError: there is less space.
    """
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise DiskFullError(str(folder), f"{size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free", _REMEDY)


def require_empty(folder: Path, error: type[InputError] = InputError, remedy: str = "Name a new folder") -> None:
    """Check that a folder can be written anew: it is absent, or holds nothing.

    Raises:
        InputError: of the given kind, it is a file or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise error(str(folder), "it is not an empty folder", remedy)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft that gets the folder's name when all is written; of one that fails nothing stays.

    Raises:
        InputError: the folder holds something.
        DiskFullError: no space.
    """
    folder = folder.absolute()
    require_empty(folder)
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        with naming_full_disk(folder):
            draft.mkdir(parents=True)
            yield draft
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_atomic(path: Path, data: bytes) -> Path:
    """Write a file by a temporary one beside it, fsync and rename: a reader sees the old file or the new one.

    Raises:
        DiskFullError: no space; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            _write(handle, data)
            Path(name).chmod(0o644)  # mkstemp makes files for the owner only
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)
    return path


def write_synced(path: Path, data: bytes) -> Path:
    """Write a file into a draft folder, which gets its name only when all its files are there.

    Raises:
        DiskFullError: no space.
    """
    with naming_full_disk(path):
        _write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), data)
    return path


def _write(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON document atomically."""
    return write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a JSON line with one write, so that a killed process leaves a whole line or none.

    Raises:
        DiskFullError: no space; the lines that were there stay.
    """
    data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # a power cut tore the line before
        with naming_full_disk(path):
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; a line that a power cut tore is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # torn
    return [row for row in rows if isinstance(row, dict)]
