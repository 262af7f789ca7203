"""What lies in a folder of training data: pictures, and beside each its caption, its condition map and its mask.

Nothing is decoded here. Captions are `metadata.jsonl`, `name.txt` or `name.caption`; maps and masks are pictures of
their own, which are never learnt from: `conditions/name.png`, and `masks/name.png` or `name.mask.png`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graft.studio.errors import DataError
from graft.studio.pictures import SUFFIXES, find_pictures

if TYPE_CHECKING:
    from graft.diffusion.data import DataConfig

CONDITIONS = "conditions"
"""Sub-folder beside pictures: condition maps under their names."""
MASKS = "masks"
"""Sub-folder beside pictures: masks under their names, white where the loss counts in full."""
MARK = ".mask"
"""Ending of the name of a mask that lies beside its picture: name.mask.png."""


class Found(NamedTuple):
    """A picture and what lies beside it."""

    path: Path
    """Its file."""
    caption: str | None
    """What it shows; None leaves it to the method."""
    condition: Path | None
    """File of its condition map."""
    mask: Path | None
    """File of its mask."""


def find(config: DataConfig, problems: list[str]) -> list[Found]:
    """The pictures of a folder by path; complaints go to `problems`.

    Raises:
        DataError: no folder, or no pictures in it.
    """
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(config.path, "there is no such folder", "Give data.path a folder of pictures")
    own, maps = _metadata(root, problems)
    listed = {path.resolve() for path in maps.values()}
    everything = find_pictures(root)
    paths = [
        path
        for path in everything
        if not _is_mask(path, root) and CONDITIONS not in _folders(path, root) and path.resolve() not in listed
    ]
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(config.path, f"the folder holds no pictures ({kinds})", "Put the pictures there")
    found = [
        Found(
            path,
            _configured(path, own.get(path.resolve()) or _beside(path, root, problems), config),
            maps.get(path.resolve()) or map_beside(path),
            mask_beside(path),
        )
        for path in paths
    ]
    used = {each.mask.resolve() for each in found if each.mask is not None}
    problems += [
        f"{path.relative_to(root)}: there is no picture of this name"
        for path in everything
        if _is_mask(path, root) and path.resolve() not in used
    ]
    return found


def map_beside(path: Path) -> Path | None:
    """The condition map of a picture in the folder `conditions` beside it: its name, or that with another ending."""
    return _same_name(path, path.parent / CONDITIONS)


def mask_beside(path: Path) -> Path | None:
    """The mask of a picture: name.mask.png beside it, or its name in the folder `masks` there."""
    files = (path.with_name(path.stem + MARK + suffix) for suffix in sorted(SUFFIXES))
    return next((file for file in files if file.is_file()), None) or _same_name(path, path.parent / MASKS)


def _same_name(path: Path, folder: Path) -> Path | None:
    names = [path.name, *(path.stem + suffix for suffix in sorted(SUFFIXES))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _folders(path: Path, root: Path) -> tuple[str, ...]:
    return path.relative_to(root).parts[:-1]


def _is_mask(path: Path, root: Path) -> bool:
    return path.stem.endswith(MARK) or MASKS in _folders(path, root)


def _metadata(root: Path, problems: list[str]) -> tuple[dict[Path, str], dict[Path, Path]]:
    """Captions and condition maps of metadata.jsonl: per line an object with `file_name`, and `text` or `condition`."""
    file = root / "metadata.jsonl"
    captions: dict[Path, str] = {}
    maps: dict[Path, Path] = {}
    if not file.exists():
        return captions, maps
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            target, text = (root / entry["file_name"]).resolve(), entry.get("text", entry.get("caption"))
            told = root / entry["condition"] if "condition" in entry else None
        except (ValueError, KeyError, TypeError):
            problems.append(f'{file.name}:{number}: expected {{"file_name": "...", "text": "..."}}')
            continue
        if not target.is_relative_to(root.resolve()):
            problems.append(f"{file.name}:{number}: {entry['file_name']} lies outside the folder")
        elif not target.is_file():
            problems.append(f"{file.name}:{number}: there is no {entry['file_name']}")
        elif told is not None and not told.resolve().is_relative_to(root.resolve()):
            problems.append(f"{file.name}:{number}: {entry['condition']} lies outside the folder")
        elif told is not None and not told.is_file():
            problems.append(f"{file.name}:{number}: there is no {entry['condition']}")
        elif told is None and (not isinstance(text, str) or not text.strip()):
            problems.append(f"{file.name}:{number}: no text")
        else:
            captions |= {target: text.strip()} if isinstance(text, str) and text.strip() else {}
            maps |= {target: told} if told is not None else {}
    return captions, maps


def caption_file(path: Path) -> Path | None:
    """The file beside a picture that holds its caption, if there is one."""
    files = (path.with_suffix(suffix) for suffix in (".txt", ".caption"))
    return next((file for file in files if file.exists()), None)


def _beside(path: Path, root: Path, problems: list[str]) -> str | None:
    file = caption_file(path)
    if file is None:
        return None
    try:
        return file.read_text("utf-8-sig").strip() or None
    except UnicodeDecodeError:
        problems.append(f"{file.relative_to(root)}: the caption is not UTF-8 text")
        return None


def _configured(path: Path, own: str | None, config: DataConfig) -> str | None:
    """The picture's own caption, or the template filled in; `{token}` is left for the method."""
    if config.caption is None or (own and "{caption}" not in config.caption):
        return own
    folder = re.sub(r"^\d+_(?=.)", "", path.parent.resolve().name)  # kohya's folders begin with how often they count
    filled = config.caption.replace("{folder}", folder.replace("_", " ")).replace("{name}", path.stem.replace("_", " "))
    return filled.replace("{caption}", own or "").strip(" ,") or None
