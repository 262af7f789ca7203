"""Data sets as they are published for few-shot and transfer benchmarks, with their official splits.

split_zhou_*.json     CoOp's eleven few-shot sets (Zhou et al., 2021, arXiv:2109.01134): {"train": [[file, label,
                      class name], ...], "val": ..., "test": ...}; files lie below the folder or one below that
images_variant_*.txt  FGVC-Aircraft: a line "0034309 A320" in the files of train, val and test; images/0034309.jpg
classnames.txt        ImageNet: a line "n01440764 tench" for each folder in images/train and images/val; the val
                      part is the test
train800val200.txt    VTAB-1k (Zhai et al., 2019, arXiv:1910.04867) as files: a line "images/train/000.jpg 5" in
                      train800.txt, val200.txt and test.txt; without the first two, train800val200.txt is trained on
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.studio.errors import DataError
from graft.studio.labelled.sources import Item, listed
from graft.studio.pictures import find_pictures

Found = tuple[Path, list[Item]]
"""A folder, and items by their paths in it."""


def published(root: Path) -> Found | None:
    """Returns the items of a folder that is laid out as one of these sets; None if it is not.

    Raises:
        DataError: a list that cannot be read, or names pictures that are not there.
    """
    lists = sorted(root.glob("split_zhou_*.json"))
    if len(lists) > 1:
        told = ", ".join(path.name for path in lists)
        raise DataError(str(root), f"it holds several splits: {told}", "Leave one of them")
    readers: list[tuple[bool, Callable[[], Iterator[Item]]]] = [
        (bool(lists), lambda: _few_shot(root, lists[0])),
        ((root / "images_variant_train.txt").is_file(), lambda: _aircraft(root)),
        ((root / "classnames.txt").is_file(), lambda: _imagenet(root)),
        ((root / "train800val200.txt").is_file(), lambda: _vtab(root)),
    ]
    for fits, read in readers:
        if fits:
            items = list(read())
            if missing := [item.name for item in items if not (root / item.name).is_file()]:
                raise listed(str(root), [f"there is no {name}" for name in missing], "Unpack the pictures here")
            return root, items
    return None


def _few_shot(root: Path, file: Path) -> Iterator[Item]:
    try:
        table = json.loads(file.read_text("utf-8"))
        parts = {part: [(str(row[0]), str(row[2])) for row in rows] for part, rows in table.items()}
        first = next(name for rows in parts.values() for name, _ in rows)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        expected = 'expected {"train": [["file", 0, "class name"], ...], ...}'
        raise DataError(str(file), expected, "Take the published file") from None
    below = (folder for folder in [root, *sorted(root.iterdir())] if folder.is_dir())
    where = next((folder for folder in below if (folder / first).is_file()), root)
    for part, rows in parts.items():
        for name, label in rows:
            yield _inside(root, (where / name).relative_to(root).as_posix(), label, part)


def _aircraft(root: Path) -> Iterator[Item]:
    for part in ("train", "val", "test"):
        for name, label in _pairs(root / f"images_variant_{part}.txt", first=True):
            yield _inside(root, f"images/{name}.jpg", label, part)


def _imagenet(root: Path) -> Iterator[Item]:
    names = dict(_pairs(root / "classnames.txt", first=True))
    for folder, part in (("images/train", "train"), ("images/val", "test")):
        for path in find_pictures(root / folder):
            label = names.get(path.parent.name)
            if label is not None:  # names of two synsets may be equal: the folder tells them apart
                twins = sum(name == label for name in names.values()) > 1
                yield Item(path.relative_to(root).as_posix(), f"{label} ({path.parent.name})" if twins else label, part)


def _vtab(root: Path) -> Iterator[Item]:
    apart = (root / "train800.txt").is_file() and (root / "val200.txt").is_file()
    parts = {"train800": "train", "val200": "val"} if apart else {"train800val200": "train"}
    for list_, part in (parts | {"test": "test"}).items():
        for name, label in _pairs(root / f"{list_}.txt"):
            yield _inside(root, name, label, part)


def _pairs(file: Path, first: bool = False) -> Iterator[tuple[str, str]]:
    """Two words of each line, divided at the first space or at the last."""
    if not file.is_file():
        raise DataError(str(file), "there is no such list", "Take the published files")
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        one, _, two = line.strip().partition(" ") if first else line.strip().rpartition(" ")
        if not one or not two:
            raise DataError(f"{file.name}:{number}", "expected a picture and its label", "Take the published file")
        yield one, two.strip()


def _inside(root: Path, name: str, label: str, part: str) -> Item:
    """An item, if it lies in the folder."""
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise DataError(str(root), f"{name} lies outside the folder", "Take the published files")
    return Item(name, label, part)
