"""Which picture is trained on, which is validated on, and which is not touched before the end. A split is a file.

The file is JSON lines: a head (classes, where the pictures are), then one line for each picture with its part and, for
pictures that were opened, its SHA-256. It is written into every run and can be given to another (`data.split`).

Test pictures are put aside first and depend on nothing but the data; the shots are drawn from the rest by `data.seed`;
validation pictures come out of the shots, so a method that looks at them has not seen more labels than it says.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graft.studio.errors import DataError
from graft.studio.labelled.sources import Item, LabelledConfig, Source

log = logging.getLogger(__name__)
FILE = "split.jsonl"
"""Its name in a run folder."""
VERSION = 1
PARTS = ("train", "val", "test", "unused")


@dataclass(frozen=True)
class Split:
    """Every item's part."""

    classes: tuple[str, ...]
    """Names of the classes; a label is a place in them."""
    items: tuple[Item, ...]
    """With part train, val, test, or unused."""
    digests: Mapping[str, str]
    """SHA-256 of the pictures that were opened, by name."""
    head: Mapping[str, Any]
    """Where the pictures are and how the split was drawn."""

    def part(self, name: str) -> list[Item]:
        """Returns the items of train, val, test or unused."""
        return [item for item in self.items if item.part == name]

    def with_digests(self, names: Sequence[str], digests: Sequence[str]) -> Split:
        """Returns the split with the digests of pictures that were opened.

        Raises:
            DataError: a picture is not the one that the split was made with.
        """
        found = dict(zip(names, digests, strict=True))
        changed = [name for name, digest in found.items() if self.digests.get(name, digest) != digest]
        if changed:
            reason = f"{len(changed)} pictures are not those of the split, such as {changed[0]}"
            raise DataError(str(self.head.get("path", "")), reason, "Bring the pictures back, or draw a new split")
        return replace(self, digests={**self.digests, **found})

    @property
    def text(self) -> str:
        """The file."""
        head = {"graft_split": VERSION, "classes": list(self.classes), **self.head}
        rows = [
            {"name": item.name, "label": item.label, "part": item.part, "sha256": self.digests.get(item.name)}
            for item in self.items
        ]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [head, *rows])

    @property
    def digest(self) -> str:
        """SHA-256 of what is in which part."""
        rows = [(item.name, item.label, item.part, self.digests.get(item.name)) for item in self.items]
        return hashlib.sha256(json.dumps([self.classes, rows], ensure_ascii=False).encode()).hexdigest()


def make_split(source: Source, config: LabelledConfig) -> Split:
    """Draws a split from a source, or reads the one that the config names.

    Raises:
        DataError: a class without a picture to train on, or a split file that is not of this source.
    """
    if config.split:
        return _fitting(read_split(config.split), source)
    declared = {item.part for item in source.items}
    by_class: dict[str, list[Item]] = defaultdict(list)
    for item in source.items:
        by_class[item.label].append(item)
    dealt: dict[str, str] = {}
    for number, label in enumerate(sorted(by_class)):
        dealt |= _deal(by_class[label], declared, config, number)
    items = tuple(replace(item, part=dealt[item.name]) for item in source.items)
    head = {"path": config.path, "dataset": config.dataset, "shots": config.shots, "seed": config.seed}
    split = Split(tuple(sorted(by_class)), items, {}, head)
    _tell(split, config)
    return split


def _deal(items: Sequence[Item], declared: set[str], config: LabelledConfig, number: int) -> dict[str, str]:
    """Name -> part for the items of one class."""
    dealt = {item.name: "test" for item in items if item.part == "test"}
    pool = [item.name for item in items if item.part != "test"]
    if "test" not in declared:
        drawn = np.random.default_rng([0, number]).permutation(len(pool))
        aside = {pool[k] for k in drawn[: int(config.test * len(pool))]}
        dealt |= dict.fromkeys(aside, "test")
        pool = [name for name in pool if name not in aside]
    own_val = {item.name for item in items if item.part == "val"}
    if own_val and not config.shots:
        return dealt | {name: "val" if name in own_val else "train" for name in pool}
    pool = [name for name in pool if name not in own_val]
    rng = np.random.default_rng([1, config.seed, number])
    order = [pool[k] for k in rng.permutation(len(pool))]
    shots = order[: config.shots] if config.shots else order
    held = 0 if "val" in declared and not config.shots else min(round(config.validation * len(shots)), len(shots) - 1)
    dealt |= dict.fromkeys([*order[len(shots) :], *own_val], "unused")
    return dealt | dict.fromkeys(shots[:held], "val") | dict.fromkeys(shots[held:], "train")


def _tell(split: Split, config: LabelledConfig) -> None:
    """Says what a user would want to know.

    Raises:
        DataError: a class without a picture to train on.
    """
    counts = dict.fromkeys(split.classes, 0)
    for item in split.part("train") + split.part("val"):
        counts[item.label] += 1
    trained = {item.label for item in split.part("train")}
    if empty := [label for label in split.classes if label not in trained]:
        reason = f"{len(empty)} classes have no picture to train on: {', '.join(empty[:10])}"
        raise DataError(config.path or config.dataset, reason, "Add pictures, or lower data.test")
    if single := [label for label, count in counts.items() if count == 1]:
        log.warning("%d classes have one picture, which is trained on and not validated: %s", len(single),
                    ", ".join(single[:10]))  # fmt: skip
    if config.shots and (few := {label: n for label, n in counts.items() if n < config.shots}):
        told = ", ".join(f"{label} has {n}" for label, n in list(few.items())[:10])
        log.warning("fewer than %d shots in %d classes, all of which are used: %s", config.shots, len(few), told)


def read_split(path: str | Path) -> Split:
    """Reads a split file.

    Raises:
        DataError: not a split file.
    """
    try:
        head, *rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
        if head.pop("graft_split") != VERSION:
            raise ValueError("another version")
        items = tuple(Item(row["name"], row["label"], row["part"]) for row in rows)
        digests = {row["name"]: row["sha256"] for row in rows if row["sha256"]}
        return Split(tuple(head.pop("classes")), items, digests, head)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"it is not a split file ({str(error) or type(error).__name__})"
        raise DataError(str(path), reason, f"Give the {FILE} of a run") from error


def _fitting(split: Split, source: Source) -> Split:
    """The split, if its pictures are in the source."""
    known = {item.name: item.label for item in source.items}
    wanted = [item for item in split.items if item.part in ("train", "val")]
    missing = [item.name for item in wanted if known.get(item.name) != item.label]
    if missing:
        reason = f"{len(missing)} pictures of the split are missing or have another label, such as {missing[0]}"
        raise DataError(source.where, reason, "Give the data that the split was made of")
    return split


def asked(source: Source, file: str, part: str = "test") -> tuple[Split | None, list[Item]]:
    """The split of a file, if one is given, and the items to measure on.

    Args:
        source: where the pictures are.
        file: of a split; empty takes the part that the source declares as test, or else everything.
        part: of the split.

    Raises:
        DataError: nothing is left.
    """
    split = read_split(file) if file else None
    items = split.part(part) if split else [item for item in source.items if item.part == "test"] or source.items
    if not items:
        reason = f"no picture is in the part {part!r}"
        raise DataError(source.where, reason, "Put data.test above 0, or give --data DIR with class folders")
    return split, items


def refuse_contradictions(split: Split, where: str) -> None:
    """Refuses the same picture under two labels among those that were opened.

    Raises:
        DataError: listing them.
    """
    labels = {item.name: item.label for item in split.items}
    by_digest: dict[str, str] = {}
    for name, digest in split.digests.items():
        other = by_digest.setdefault(digest, name)
        if labels[other] != labels[name]:
            reason = f"{other} and {name} are the same picture in two classes"
            raise DataError(where, reason, "Remove one of them")
