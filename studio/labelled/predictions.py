"""What a classifier says of picture files that nobody has labelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from graft.studio.config import require
from graft.studio.errors import DataError
from graft.studio.pictures import BROKEN, SUFFIXES, checked_bytes, complaint, find_pictures, open_picture

MEGAPIXELS = 120.0
"""Larger pictures are refused from their header."""


def open_files(paths: Sequence[str | Path], background: str = "white") -> dict[Path, Image.Image]:
    """Returns the pictures of files and of folders of them, RGB and upright.

    Raises:
        DataError: listing every file that is no picture; or there are none.
    """
    files = [file for path in map(Path, paths) for file in (find_pictures(path) if path.is_dir() else [path])]
    found, problems = {}, []
    for file in files:
        try:
            found[file] = open_picture(checked_bytes(file, MEGAPIXELS), background)
        except BROKEN as error:
            problems.append(f"{file}: {complaint(error)}")
    if problems or not files:
        reason = "\n  ".join([f"{len(problems)} cannot be read:", *problems]) if problems else "there are no pictures"
        raise DataError(", ".join(map(str, paths)), reason, f"Give {', '.join(sorted(SUFFIXES))} files or folders")
    return found


def told(files: Iterable[Path], probabilities: Tensor, classes: Sequence[str], top: int = 3) -> list[dict[str, Any]]:
    """Returns for each file `picture`, `label`, `probability` and `top`, the surest classes first.

    Raises:
        InputError: none of the classes is to be named.
    """
    require("top", top, top >= 1, "1 or more")
    rows = []
    for file, row in zip(files, probabilities, strict=True):
        best = row.topk(min(top, len(classes)))
        named = [{"label": classes[int(k)], "probability": float(row[k])} for k in best.indices]
        rows.append({"picture": str(file), **named[0], "top": named})
    return rows
