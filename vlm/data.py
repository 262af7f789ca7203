"""Pictures by class, and the files that say which of them may be learnt from.

A data folder has a `splits.jsonl` with lines {"path", "class", "split"}; or folders `train`, `test` and perhaps `val`,
each with a folder per class; or a folder per class, all of it for training. `read_split` opens training pictures and
nothing else. Test pictures are opened by `read_test` alone, which only the evaluation calls.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from graft.studio.caches import content_key
from graft.studio.disk import write_atomic
from graft.studio.errors import DataError

log = logging.getLogger("graft")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
PARTS = ("train", "val", "test")
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a good photo of the {}.",
    "a close-up of the {}.",
)
"""Prompts whose features are averaged into a class's zero-shot weights."""


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` section of a job."""

    path: str
    """Folder of class folders; or of `train` and `test`, each with class folders; or with a `splits.jsonl`."""
    shots: int = 0
    """Training pictures taken of each class; 0 takes all. A class with fewer gives what it has."""
    seed: int = 0
    """Names the choice of the shots."""
    validation: int = -1
    """How many of a class's shots are kept from training to judge by; -1 takes a quarter of them, at most 4. With
    fewer than 4 shots that is none, and what would be chosen by them keeps its default."""
    classes: Literal["all", "base", "new"] = "all"
    """All classes, or the first or second half of them in order of their folders."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts of the zero-shot classifier; {} is the class name."""
    splits: str = ""
    """File with the splits, if not splits.jsonl in the folder."""
    names: str = ""
    """JSON file {folder: name} with what classes are called; elsewhere a folder's name is the class's."""
    views: int = 10
    """Random crops of each training picture whose features are kept; 0 trains on the whole picture only."""
    crop: float = 0.5
    """Smallest share of the picture's area in a crop."""
    flip: bool = True
    """Mirror half of the crops."""
    background: str = "white"
    """What transparent pictures are laid on: a colour name or #rrggbb."""
    max_megapixels: float = 120.0
    """Larger pictures are refused from their header."""

    def __post_init__(self) -> None:
        self._check("shots", self.shots, self.shots >= 0, "0 or more")
        self._check("validation", self.validation, self.validation >= -1, "-1 or more")
        self._check("views", self.views, 0 <= self.views <= 300, "0 to 300")
        self._check("crop", self.crop, 0 < self.crop <= 1, "above 0, up to 1")
        self._check("max_megapixels", self.max_megapixels, 0 < self.max_megapixels <= 1000, "above 0, up to 1000")
        self._check("templates", self.templates, len(self.templates) > 0, "at least one")
        for template in self.templates:
            self._check("templates", template, template.count("{}") == 1, "one {} for the class name")

    @staticmethod
    def _check(name: str, value: object, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(f"data.{name} = {value!r}", f"expected {expected}", "Change it in the [data] section")


@dataclass(frozen=True)
class Example:
    """One picture that is known to open."""

    path: Path
    """Where it lies."""
    label: int
    """Its class."""
    digest: str
    """SHA-256 of the file's bytes."""


@dataclass(frozen=True)
class Split:
    """What a training sees: never the test pictures."""

    names: tuple[str, ...]
    """Class names, in order of the labels."""
    train: tuple[Example, ...]
    """To learn from."""
    validation: tuple[Example, ...]
    """Shots that were kept back to judge by."""

    @property
    def digest(self) -> str:
        """SHA-256 of names and pictures: what the card of an adapter names."""
        parts = [[e.digest, e.label] for e in self.train], [[e.digest, e.label] for e in self.validation]
        return content_key(self.names, *parts)

    @property
    def shots(self) -> list[int]:
        """Training pictures of each class."""
        return torch.bincount(labels_of(self.train), minlength=len(self.names)).tolist()


def labels_of(examples: Sequence[Example]) -> Tensor:
    """Labels, (n,) long."""
    return torch.tensor([example.label for example in examples], dtype=torch.long)


def read_split(config: DataConfig) -> Split:
    """Chooses the shots and checks them, before anything is computed.

    Raises:
        DataError: listing every file that cannot be used, or classes that cannot be told apart.
    """
    found = _listed(config)
    folders = _chosen_classes(sorted({cls for _, cls, part in found if part == "train"}), config)
    names = _names(folders, config)
    kept_back = {cls: [path for path, of, part in found if of == cls and part == "val"] for cls in folders}
    train: list[tuple[Path, int]] = []
    validation: list[tuple[Path, int]] = []
    for label, cls in enumerate(folders):
        paths = [path for path, of, part in found if of == cls and part == "train"]
        chosen = [paths[i] for i in _order(len(paths), config.seed, cls)][: config.shots or None]
        held = min(len(chosen) // 4, 4) if config.validation < 0 else min(config.validation, len(chosen) - 1)
        others = kept_back[cls][: held or None] if kept_back[cls] and config.validation else []
        validation += [(path, label) for path in others or chosen[len(chosen) - held :]]
        train += [(path, label) for path in (chosen if others else chosen[: len(chosen) - held])]
    split = Split(names, *_opened(config, train, validation))
    if len(set(split.shots)) > 1:
        log.warning("classes have %d to %d training pictures", min(split.shots), max(split.shots))
    return split


def read_test(config: DataConfig) -> tuple[tuple[str, ...], tuple[Example, ...]]:
    """Class names and test pictures; of a plain folder of class folders, all pictures.

    Raises:
        DataError: there are none, or some cannot be used.
    """
    found = _listed(config)
    parts = {part for _, _, part in found}
    if "test" not in parts and len(parts) > 1:
        raise DataError(config.path, "it has no test pictures", "Add them to the splits, or name another folder")
    wanted = "test" if "test" in parts else "train"
    folders = _chosen_classes(sorted({cls for _, cls, _ in found}), config)
    label = {cls: k for k, cls in enumerate(folders)}
    chosen = [(path, label[cls]) for path, cls, part in found if part == wanted and cls in label]
    return _names(folders, config), _opened(config, chosen)[0]


def has_test(config: DataConfig) -> bool:
    """Whether a folder has test pictures of its own. Their names are looked at, not the pictures."""
    return any(part == "test" for _, _, part in _listed(config))


def write_splits(config: DataConfig, test: float, file: Path) -> dict[str, int]:
    """Divides a plain folder into training and test pictures, by class, and writes the splits as a file.

    Args:
        config: folder and seed.
        test: share of each class's pictures that becomes test; every class keeps one for training.
        file: JSONL.

    Returns:
        How many pictures each part has.
    """
    lines, counts = [], dict.fromkeys(("train", "test"), 0)
    root = Path(config.path).absolute()
    for cls, paths in _class_folders(Path(config.path)):
        order = [paths[i] for i in _order(len(paths), config.seed, cls)]
        cut = min(round(test * len(order)), len(order) - 1)
        for k, path in enumerate(order):
            part = "test" if k < cut else "train"
            counts[part] += 1
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            name = path.absolute().relative_to(root).as_posix()
            lines.append(json.dumps({"path": name, "class": cls, "split": part, "sha256": digest}))
    write_atomic(file, ("\n".join(lines) + "\n").encode())
    return counts


def _order(count: int, seed: int, cls: str) -> list[int]:
    """A permutation that depends on the seed and the class and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{cls}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(count).tolist()


def _listed(config: DataConfig) -> list[tuple[Path, str, str]]:
    """Path, class and part of all pictures that the folder or its splits name. Nothing is opened."""
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(config.path, "there is no such folder", "Give data.path a folder of class folders")
    file = root / (config.splits or "splits.jsonl")
    if file.is_file():
        return list(_from_file(root, file))
    if config.splits:
        raise DataError(config.splits, "there is no such file of splits", "Write one with `graft split`")
    if (root / "train").is_dir():
        parts = [part for part in PARTS if (root / part).is_dir()]
        found = [(p, cls, part) for part in parts for cls, paths in _class_folders(root / part) for p in paths]
    else:
        found = [(path, cls, "train") for cls, paths in _class_folders(root) for path in paths]
    if not found:
        raise DataError(config.path, "it holds no folders of pictures", "Make a folder of pictures for each class")
    return found


def _class_folders(root: Path) -> Iterator[tuple[str, list[Path]]]:
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if paths:
            yield folder.name, paths


def _from_file(root: Path, file: Path) -> Iterator[tuple[Path, str, str]]:
    base = root.resolve()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            path, cls, part = str(row["path"]), str(row["class"]), str(row["split"])
        except (ValueError, KeyError, TypeError) as error:
            remedy = 'Write {"path": ..., "class": ..., "split": "train"}'
            raise DataError(f"{file.name}:{number}", "it is not a line of splits", remedy) from error
        if part not in PARTS:
            raise DataError(f"{file.name}:{number}", f"there is no split {part!r}", f"Use {', '.join(PARTS)}")
        if not (base / path).resolve().is_relative_to(base):
            raise DataError(f"{file.name}:{number}", f"{path} leads out of the folder", "Name files inside it")
        yield root / path, cls, part


def _chosen_classes(folders: list[str], config: DataConfig) -> list[str]:
    """All classes or one half: the first ceil(c / 2) in order are the base classes."""
    half = -(-len(folders) // 2)
    chosen = {"all": folders, "base": folders[:half], "new": folders[half:]}[config.classes]
    if len(chosen) < 2:
        raise DataError(config.path, f"{len(chosen)} classes are too few to tell apart", "Two or more are needed")
    return chosen


def _names(folders: list[str], config: DataConfig) -> tuple[str, ...]:
    """What the classes are called.

    Raises:
        DataError: two classes have one name, so that no prompt tells them apart.
    """
    table: dict[str, Any] = {}
    if config.names:
        try:
            table = json.loads((Path(config.path) / config.names).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(config.names, f"no names can be read ({error})", "Write {folder: name} as JSON") from error
    names = [" ".join(str(table.get(folder, folder)).replace("_", " ").split()) for folder in folders]
    first: dict[str, str] = {}
    for folder, name in zip(folders, names, strict=True):
        if not name:
            raise DataError(folder, "the class has an empty name", "Give it one in data.names")
        other = first.setdefault(name.lower(), folder)
        if other != folder:
            reason = f"classes {other!r} and {folder!r} are both called {name!r}: no prompt tells them apart"
            raise DataError(config.path, reason, "Give them different names in a JSON file, data.names")
    return tuple(names)


def _opened(config: DataConfig, *groups: list[tuple[Path, int]]) -> list[tuple[Example, ...]]:
    """Examples of the listed files, once all of them were found to be pictures of a sane size."""
    problems: list[str] = []
    examples = [tuple(e for path, label in group if (e := _example(path, label, config, problems))) for group in groups]
    if problems:
        many = f"{len(problems)} problem{'s' * (len(problems) > 1)}:"
        raise DataError(config.path, "\n  ".join([many, *problems]) + "\n", "Repair or remove what is listed")
    return examples


def _example(path: Path, label: int, config: DataConfig, problems: list[str]) -> Example | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
        if width * height > config.max_megapixels * 1e6:
            raise ValueError(f"{width:,} x {height:,} pixels, above data.max_megapixels = {config.max_megapixels:g}")
        return Example(path, label, hashlib.sha256(path.read_bytes()).hexdigest())
    except UnidentifiedImageError:
        problems.append(f"{path.relative_to(config.path)}: not a picture, whatever its name says")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problems.append(f"{path.relative_to(config.path)}: {error}")
    return None
