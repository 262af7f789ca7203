"""Where labelled pictures come from.

A *source* lists its items (name, label, declared part) without opening a picture: a folder of class folders, a CSV or
JSONL table, a pair of NumPy arrays, a data set of Hugging Face on disk, a data set in the layout of a published
benchmark, or a built-in one. A *split* (`splits`) gives every item its part.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from graft.studio.errors import DataError
from graft.studio.pictures import checked_bytes, find_pictures, opaque, open_picture

log = logging.getLogger(__name__)
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What folders, columns and arrays call the parts -> what they are called here."""
_FILES = ("file_name", "file", "path", "image", "filename")
_LABELS = ("label", "class", "category", "target", "label_name")


@dataclass(frozen=True)
class LabelledConfig:
    """Labelled pictures: the part of a `[data]` section that every domain with classes has."""

    path: str = ""
    """Folder of class folders (with train, val, test above them if you have them), a .csv or .jsonl table, a folder
    with metadata.jsonl, an .npz with images and labels or a folder with images.npy and labels.npy, a data set of
    Hugging Face saved to disk, or a few-shot or VTAB-1k set in its published layout."""
    dataset: str = ""
    """Instead of a path, a built-in set: pocket-new, pocket-colour, pocket-count, drawn-digits, or scikit-learn's
    digits."""
    split: str = ""
    """A split file that an earlier run wrote, to train on the same pictures again."""
    shots: int = 0
    """Labelled pictures for each class, those for validation among them; 0 takes all."""
    validation: float = 0.2
    """Share of a class's labelled pictures that is kept for validation, where the data declare none."""
    test: float = 0.2
    """Share of each class that is put aside for the test at the end, where the data declare none."""
    seed: int = 0
    """Draws the shots; the test pictures stay the same whatever it is."""
    background: str = "white"
    """What transparent pictures are laid on: a colour name or #rrggbb."""
    max_megapixels: float = 120.0
    """Larger pictures are refused from their header."""

    def __post_init__(self) -> None:
        self._check("shots", self.shots, self.shots >= 0, "0 or more")
        self._check("validation", self.validation, 0 <= self.validation < 1, "0 up to but not 1")
        self._check("test", self.test, 0 <= self.test < 1, "0 up to but not 1")
        self._check("seed", self.seed, self.seed >= 0, "0 or more")
        if bool(self.path) == bool(self.dataset):
            given = f"data.path = {self.path!r}, data.dataset = {self.dataset!r}"
            raise DataError(given, "exactly one of them says where the pictures are", "Set one of the two")

    @staticmethod
    def _check(name: str, value: object, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(f"data.{name} = {value!r}", f"expected {expected}", "Change it in the [data] section")


@dataclass(frozen=True)
class Item:
    """A labelled picture that nobody has opened yet."""

    name: str
    """Its path in the source, or its number."""
    label: str
    """Name of its class."""
    part: str = ""
    """train, val or test where the source declares it."""


@dataclass(frozen=True)
class Source:
    """Items and the way to open one."""

    where: str
    """For messages."""
    items: list[Item]
    """By name; no name twice."""
    read: Callable[[str], Any]
    """Bytes of a file, or an array (h, w) or (h, w, c), of the item with a name."""

    def only(self, keep: Callable[[str], bool]) -> Source:
        """Returns the source with the items of some classes."""
        return Source(self.where, [item for item in self.items if keep(item.label)], self.read)


def decoded(stored: Any, background: str = "white") -> Image.Image:
    """Returns what a source read as a picture: RGB, upright, transparent parts on the background."""
    if isinstance(stored, bytes):
        return open_picture(stored, background)
    return opaque(Image.fromarray(stored[..., 0] if stored.ndim == 3 and stored.shape[-1] == 1 else stored), background)


def digest_of(stored: Any) -> str:
    """SHA-256 of what a source read."""
    return hashlib.sha256(stored if isinstance(stored, bytes) else np.ascontiguousarray(stored).tobytes()).hexdigest()


def open_source(config: LabelledConfig) -> Source:
    """Returns the items behind a config; no picture is opened.

    Raises:
        DataError: nothing there, or names, labels or classes that contradict each other.
    """
    if config.dataset:
        from graft.studio.labelled.built_in import built_in

        return _checked(built_in(config.dataset))
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(config.path, "there is no such file or folder", "Give data.path a folder, table or array file")
    if path.suffix == ".npz":
        return _checked(_arrays(path))
    if path.suffix in (".csv", ".jsonl"):
        return _checked(_table(path, config))
    if not path.is_dir():
        raise DataError(config.path, "neither a folder nor a .csv, .jsonl or .npz file", "Give one of these")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _checked(_hugging_face(path))
    from graft.studio.labelled.published import published

    if (found := published(path)) is not None:
        return _checked(_files(*found, config))
    if any(path.glob("*.npy")):
        return _checked(_arrays(path))
    for table in ("metadata.jsonl", "metadata.csv"):
        if (path / table).is_file():
            return _checked(_table(path / table, config))
    return _checked(_folder(path, config))


def _checked(source: Source) -> Source:
    """The source, its items sorted and each once.

    Raises:
        DataError: a picture with two labels, class names that differ in case or spaces only, or fewer than two classes.
    """
    seen: dict[str, Item] = {}
    problems = []
    for item in source.items:
        other = seen.setdefault(item.name, item)
        if (other.label, other.part) != (item.label, item.part):
            told = " and ".join(f"{each.label}{f' ({each.part})' if each.part else ''}" for each in (other, item))
            problems.append(f"{item.name} is listed twice, as {told}")
    if len(seen) < len(source.items) and not problems:
        log.warning("%s: %d names are listed twice and count once", source.where, len(source.items) - len(seen))
    folded: dict[str, str] = {}
    for label in sorted({item.label for item in source.items}):
        twin = folded.setdefault(" ".join(label.replace("_", " ").casefold().split()), label)
        if twin != label:
            problems.append(f"classes {twin!r} and {label!r} have the same name but for case, spaces or underscores")
    if problems:
        raise listed(source.where, problems, "Give every picture one label and every class one name")
    if len(folded) < 2:
        found = f"only the class {next(iter(folded.values()))!r}" if folded else "no pictures in class folders"
        raise DataError(source.where, f"it has {found}", "Give at least two classes, a folder for each")
    return Source(source.where, [seen[name] for name in sorted(seen, key=_natural)], source.read)


def _natural(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 0, name)


def listed(where: str, problems: Sequence[str], remedy: str) -> DataError:
    """Returns one error with every problem, the first fifty of them by name."""
    shown = [*problems[:50], *([f"and {len(problems) - 50} more"] if len(problems) > 50 else [])]
    many = f"{len(problems)} problem{'s' * (len(problems) > 1)}:"
    return DataError(where, "\n  ".join([many, *shown]) + "\n", remedy)


def _folder(root: Path, config: LabelledConfig) -> Source:
    """Class folders, or parts with class folders in them."""
    top = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    parts = {name: PARTS[name.lower()] for name in top if name.lower() in PARTS}
    if parts and set(parts) != set(top):
        reason = f"it holds the parts {', '.join(parts)} beside {', '.join(sorted(set(top) - set(parts)))}"
        raise DataError(str(root), reason, "Put all class folders into parts, or none")
    items, found = [], find_pictures(root)
    loose = [str(path.relative_to(root)) for path in found if len(path.relative_to(root).parts) < 2 + bool(parts)]
    if loose:
        raise listed(str(root), [f"{name} lies in no class folder" for name in loose], "Move or remove them")
    for path in found:
        first, *rest = path.relative_to(root).parts
        part, label = (parts[first], rest[0]) if parts else ("", first)
        items.append(Item(path.relative_to(root).as_posix(), label, part))
    filled = {item.name.rpartition("/")[0].split("/")[bool(parts)] for item in items}
    folders = [c for name in parts or [""] for c in (root / name).iterdir() if c.is_dir() and c.name[0] != "."]
    if empty := sorted({folder.name for folder in folders} - filled):
        raise listed(str(root), [f"class {name!r} has no pictures" for name in empty], "Fill or remove its folder")
    return _files(root, items, config)


def _files(root: Path, items: list[Item], config: LabelledConfig) -> Source:
    return Source(str(root), items, lambda name: checked_bytes(root / name, config.max_megapixels))


def _table(path: Path, config: LabelledConfig) -> Source:
    """A CSV or JSONL file with a column for the picture, one for its label and maybe one for its part."""
    root, items = path.parent, list[Item]()
    problems: list[str] = []
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(str(path), "it is not UTF-8 text", "Save it as UTF-8") from None
    for number, row in _rows(path, text, problems):
        file = next((str(row[key]) for key in _FILES if row.get(key)), "")
        label = next((str(row[key]).strip() for key in _LABELS if row.get(key) not in (None, "")), "")
        part = str(row.get("split") or row.get("part") or "").strip().lower()
        if not file or not label:
            missing = f"a picture ({', '.join(_FILES[:3])})" if not file else f"a label ({', '.join(_LABELS[:3])})"
            problems.append(f"line {number}: it lacks {missing}")
        elif not (root / file).resolve().is_relative_to(root.resolve()):
            problems.append(f"line {number}: {file} lies outside the table's folder")
        elif not (root / file).is_file():
            problems.append(f"line {number}: there is no {file}")
        elif part and part not in PARTS:
            problems.append(f"line {number}: split {part!r} is none of {', '.join(PARTS)}")
        else:
            items.append(Item(Path(file).as_posix(), label, PARTS.get(part, "")))
    if problems:
        raise listed(str(path), problems, "Correct these lines")
    return _files(root, items, config)


def _rows(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
            yield number, {str(key).strip().lower(): value for key, value in row.items()}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            yield number, found
        else:
            problems.append(f'line {number}: expected {{"file_name": "...", "label": "..."}}')


def _arrays(path: Path) -> Source:
    """Arrays `images` (n, h, w) or (n, h, w, 3) and `labels` (n,), maybe with `classes`; or one pair for each part.

    They are those of an .npz, or the .npy files of a folder, which are mapped and not read whole.
    """
    try:
        file = _npy_files(path) if path.is_dir() else np.load(path, allow_pickle=False)
        keys = {key.lower(): key for key in file}
        pairs: list[tuple[str, str | None, str | None]] = [
            ("", _key(keys, ("images", "x", "data")), _key(keys, ("labels", "y", "target")))
        ]
        pairs += [(part, keys.get(f"x_{name}"), keys.get(f"y_{name}")) for name, part in PARTS.items()]
        pairs = [(part, x, y) for part, x, y in pairs if x and y]
        classes = [str(name) for name in file[keys["classes"]]] if "classes" in keys else []
        labels = {y: np.asarray(file[y]).reshape(-1) for _, _, y in pairs if y}
        lengths = {x: _length(file, x) for _, x, _ in pairs if x}
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"its arrays cannot be read ({error})", "Save it with numpy.savez") from error
    if not pairs:
        raise DataError(str(path), f"it holds {', '.join(file)}", "Name its arrays images and labels")
    for _, x, y in pairs:
        if lengths[str(x)] != len(labels[str(y)]):
            reason = f"it holds {lengths[str(x)]} pictures in {x} and {len(labels[str(y)])} labels in {y}"
            raise DataError(str(path), reason, "Give every picture one label, a name or a number")
    opened: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        key, _, row = name.rpartition("/")
        if key not in opened:
            opened[key] = _bytes_of(file[key], str(path))
        return opened[key][int(row)]

    items = []
    for part, x, y in pairs:
        for row, label in enumerate(labels[str(y)].tolist()):
            named = classes[label] if classes and isinstance(label, int) and label < len(classes) else str(label)
            items.append(Item(f"{x}/{row:07d}", named, part))
    return Source(str(path), items, read)


def _length(file: Any, key: str) -> int:
    """Rows of an array, which is not read for it."""
    if isinstance(file, dict):
        return len(file[key])
    with file.zip.open(f"{key}.npy") as opened:
        old = np.lib.format.read_magic(opened) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        return int(header(opened)[0][0])


def _npy_files(folder: Path) -> dict[str, np.ndarray]:
    found = sorted(folder.glob("*.npy"))
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in found}


def _key(keys: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((keys[name] for name in names if name in keys), None)


def _bytes_of(images: np.ndarray, where: str) -> np.ndarray:
    """Pictures as uint8.

    Raises:
        DataError: another shape, or numbers whose range says nothing.
    """
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4)):
        raise DataError(where, f"images of shape {images.shape}", "Give (n, h, w) or (n, h, w, 3)")
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 255:
        reason = f"images of {images.dtype} from {low:g} to {high:g}"
        raise DataError(where, reason, "Give uint8, or numbers from 0 to 1 or to 255")
    return np.asarray(images * (255 if high <= 1 else 1)).round().astype(np.uint8)


def _hugging_face(path: Path) -> Source:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(str(path), "the library 'datasets' is not installed", "Run: pip install datasets") from error
    loaded = datasets.load_from_disk(str(path))
    parts = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    items: list[Item] = []
    for name, part in parts.items():
        named = {str(name): str(name) for name in part.features}
        image, label = _key(named, ("image", "img")), _key(named, _LABELS)
        if image is None or label is None:
            raise DataError(
                str(path), f"its columns are {', '.join(part.features)}", "Name two of them image and label"
            )
        names = getattr(part.features[label], "names", None)
        for row, value in enumerate(part[label]):
            items.append(Item(f"{name}/{row:07d}", names[value] if names else str(value), PARTS.get(name, "")))

    def read(name: str) -> np.ndarray:
        part, _, row = name.rpartition("/")
        picture = parts[part][int(row)]
        return np.asarray(opaque(picture.get("image") or picture["img"]))

    return Source(str(path), items, read)
