"""Pictures with class names: which of them may be learnt from, and which are measured on.

`fit_data` opens pictures to train and validate on and nothing else. Test pictures are opened by `measured_data` alone,
which only the evaluation calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graft.studio.caches import content_key
from graft.studio.errors import DataError
from graft.studio.labelled.sources import Item, LabelledConfig, Source, digest_of, listed, open_source
from graft.studio.labelled.splits import Split, asked, make_split, refuse_contradictions
from graft.studio.pictures import BROKEN, complaint

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
class DataConfig(LabelledConfig):
    """The `[data]` section of a job."""

    validation: float = 0.25
    """Share of a class's labelled pictures that is kept for validation, where the data declare none. With one or two
    shots that is no picture, and what would be chosen by them keeps its default."""
    classes: Literal["all", "base", "new"] = "all"
    """All classes, or the first or second half of them in order of their names."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts of the zero-shot classifier; {} is the class name."""
    names: str = ""
    """JSON file {class: name} with what classes are called in prompts; elsewhere a class's own name is."""
    views: int = 10
    """Random crops of each training picture whose features are kept; 0 trains on the whole picture only."""
    crop: float = 0.5
    """Smallest share of the picture's area in a crop."""
    flip: bool = True
    """Mirror half of the crops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("views", self.views, 0 <= self.views <= 300, "0 to 300")
        self._check("crop", self.crop, 0 < self.crop <= 1, "above 0, up to 1")
        self._check("templates", self.templates, len(self.templates) > 0, "at least one")
        for template in self.templates:
            self._check("templates", template, template.count("{}") == 1, "one {} for the class name")


@dataclass(frozen=True)
class Example:
    """One picture that is known to open."""

    name: str
    """Its path in the source, or its number."""
    label: int
    """Its class."""
    digest: str
    """SHA-256 of what is stored."""
    read: Callable[[], Any]
    """Bytes of the file, or an array."""


@dataclass(frozen=True)
class FitData:
    """What a training sees: never the test pictures."""

    names: tuple[str, ...]
    """Class names as prompts say them, in order of the labels."""
    train: tuple[Example, ...]
    """To learn from."""
    validation: tuple[Example, ...]
    """Shots that were kept back to judge by."""
    split: Split
    """Every picture's part."""

    @property
    def digest(self) -> str:
        """SHA-256 of names and pictures: what the card of an adapter names."""
        parts = [[e.digest, e.label] for e in self.train], [[e.digest, e.label] for e in self.validation]
        return content_key(self.names, *parts)


def labels_of(examples: Sequence[Example]) -> Tensor:
    """Labels, (n,) long."""
    return torch.tensor([example.label for example in examples], dtype=torch.long)


def fit_data(config: DataConfig) -> FitData:
    """Chooses the shots and checks them, before anything is computed.

    Raises:
        DataError: listing every picture that cannot be used, or classes that cannot be told apart.
    """
    source, classes = _half(config)
    split = make_split(source, config)
    names = _names(classes, config)
    train, validation = (opened(source, split.part(part), classes) for part in ("train", "val"))
    every = train + validation
    split = split.with_digests([e.name for e in every], [e.digest for e in every])
    refuse_contradictions(split, source.where)
    return FitData(names, train, validation, split)


Measured = tuple[tuple[str, ...], tuple[Example, ...], FitData | None]
"""Class names, pictures to measure on, and what was trained on if a split file says so."""


def measured_data(config: DataConfig, part: str = "test") -> Measured:
    """What is measured on.

    Args:
        config: without `split`, the test part that the data declare is taken, or else all pictures.
        part: of the split.

    Raises:
        DataError: there are none, or some cannot be used.
    """
    source, classes = _half(config)
    split, items = asked(source, config.split, part)
    if split is not None and config.classes == "all":
        classes = split.classes
    items = [item for item in items if item.label in classes]
    if not items:
        raise DataError(source.where, f"no picture of the part {part!r} is in these classes", "Name other pictures")
    names = _names(classes, config)
    examples = opened(source, items, classes)
    if split is None:
        return names, examples, None
    train = opened(source, [item for item in split.part("train") if item.label in classes], classes)
    return names, examples, FitData(names, train, (), split)


def _half(config: DataConfig) -> tuple[Source, tuple[str, ...]]:
    """The source with the items of all classes or one half; the first ceil(c / 2) in order are the base classes."""
    source = open_source(config)
    every = sorted({item.label for item in source.items})
    half = -(-len(every) // 2)
    chosen = {"all": every, "base": every[:half], "new": every[half:]}[config.classes]
    if len(chosen) < 2:
        raise DataError(source.where, f"{len(chosen)} classes are too few to tell apart", "Two or more are needed")
    return source.only(set(chosen).__contains__), tuple(chosen)


def _names(classes: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """What the classes are called.

    Raises:
        DataError: two classes have one name, so that no prompt tells them apart.
    """
    table: dict[str, Any] = {}
    if config.names:
        try:
            table = json.loads((Path(config.path) / config.names).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(config.names, f"no names can be read ({error})", "Write {class: name} as JSON") from error
    names = [" ".join(str(table.get(each, each)).replace("_", " ").split()) for each in classes]
    first: dict[str, str] = {}
    for each, name in zip(classes, names, strict=True):
        if not name:
            raise DataError(each, "the class has an empty name", "Give it one in data.names")
        other = first.setdefault(name.lower(), each)
        if other != each:
            reason = f"classes {other!r} and {each!r} are both called {name!r}: no prompt tells them apart"
            raise DataError(config.path, reason, "Give them different names in a JSON file, data.names")
    return tuple(names)


def opened(source: Source, items: Sequence[Item], classes: Sequence[str]) -> tuple[Example, ...]:
    """Examples of items, once all of them were found to be pictures of a sane size.

    Raises:
        DataError: listing those that are not.
    """
    place, problems, found = {name: k for k, name in enumerate(classes)}, [], []
    for item in items:
        read = _reader(source, item.name)
        try:
            found.append(Example(item.name, place[item.label], digest_of(read()), read))
        except BROKEN as error:
            problems.append(f"{item.name}: {complaint(error)}")
    if problems:
        raise listed(source.where, problems, "Repair or remove what is listed")
    return tuple(found)


def _reader(source: Source, name: str) -> Callable[[], Any]:
    return lambda: source.read(name)
