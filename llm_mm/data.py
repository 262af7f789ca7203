"""The `[data]` section of a job, and the conversations behind it, divided into what is trained on, asked and tested."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import ImageColor

from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.formats import read_file
from graft.studio.config import require
from graft.studio.errors import DataError


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` section of a job."""

    path: str = ""
    """A .json, .jsonl or .csv file of conversations or questions, or a folder of pictures with such a file in it."""
    dataset: str = ""
    """Instead of a path, a built-in set: pocket-questions (what pocket-llava was taught) or pocket-scenes (a question
    that it was not)."""
    format: Literal["auto", "llava", "sharegpt", "messages", "alpaca", "questions"] = "auto"
    """Of the file; "auto" looks at its first row."""
    images: str = ""
    """Folder that pictures are named in; empty is the file's own."""
    validation: float = 0.1
    """Share of the pictures whose rows are kept to be asked while training, where the data declare none."""
    test: float = 0.1
    """Share of the pictures whose rows are put aside for `graft eval`, where the data declare none."""
    seed: int = 0
    """Draws these shares."""
    length: int = 2048
    """Most tokens of a row, its pictures' included; whole turns are dropped from its end until it fits."""
    packing: int = 0
    """Tokens of a row that several conversations share without seeing each other, so that little is padding; 0 gives
    each a row of its own. What is learnt is the same."""
    fit: Literal["crop", "pad"] = "crop"
    """How a picture that is not square gets into the model: as its processor does, or padded to a square with the mean
    colour."""
    background: str = "white"
    """What transparent pictures are laid on."""
    system: str = ""
    """What the system says in rows that do not tell it."""
    learn: Literal["answers", "all"] = "answers"
    """What is learnt of a row: its answers, or its questions too, which choosing an adapter by perplexity needs."""
    replay: float = 0.0
    """Share of the rows of a batch that come from old data, so that what they teach is kept; 0.5 is one to one."""
    replay_path: str = ""
    """File of the old data, as `path`; they are measured too, in training and by `graft eval`."""
    replay_dataset: str = ""
    """Instead, a built-in set."""
    limit: int = 0
    """Most rows that are trained on, the first of each set; 0 takes all."""
    checked: int = 100
    """Most answers of each set that are measured while training."""
    cache: bool = True
    """Keep what a frozen image tower says of a picture, by content, instead of asking it again at every step."""

    def __post_init__(self) -> None:
        require("data.validation", self.validation, 0 <= self.validation < 1, "0 up to but not 1")
        require("data.test", self.test, 0 <= self.test < 1, "0 up to but not 1")
        require("data.length", self.length, self.length >= 1, "1 or more")
        require("data.packing", self.packing, self.packing >= 0, "0 or more")
        require("data.replay", self.replay, 0 <= self.replay < 1, "0 up to but not 1")
        require("data.limit", self.limit, self.limit >= 0, "0 or more")
        require("data.checked", self.checked, self.checked >= 1, "1 or more")
        require("data.background", self.background, _is_colour(self.background), "a colour's name or #rrggbb")
        if bool(self.path) == bool(self.dataset):
            given = f"data.path = {self.path!r}, data.dataset = {self.dataset!r}"
            raise DataError(given, "exactly one of them says where the rows are", "Set one of the two")
        if self.replay and bool(self.replay_path) == bool(self.replay_dataset):
            reason = "nothing, or two things, say what is replayed"
            raise DataError(f"data.replay = {self.replay}", reason, "Set data.replay_path or data.replay_dataset")

    @property
    def old(self) -> DataConfig | None:
        """The old data as a config of their own, if there are any."""
        if not (self.replay_path or self.replay_dataset):
            return None
        return replace(
            self, path=self.replay_path, dataset=self.replay_dataset, format="auto", images="",
            replay=0.0, replay_path="", replay_dataset="",
        )  # fmt: skip


def _is_colour(name: str) -> bool:
    try:
        return bool(ImageColor.getrgb(name))
    except ValueError:
        return False


@dataclass(frozen=True)
class Rows:
    """The conversations of a data set, by part."""

    where: str
    """For messages."""
    folder: Path
    """That the pictures' files lie in."""
    train: tuple[Conversation, ...]
    """What is trained on."""
    val: tuple[Conversation, ...]
    """What is asked while training."""
    test: tuple[Conversation, ...]
    """What `graft eval` asks."""

    def part(self, name: str) -> tuple[Conversation, ...]:
        """Those of one part."""
        found: tuple[Conversation, ...] = getattr(self, name)
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the texts, and of the pictures' names in their folder and sizes in bytes, part by part.

        The same wherever the folder stands. No picture is read for it; those in memory go by their content.
        """
        total = hashlib.sha256()
        for name in ("train", "val", "test"):
            for row in self.part(name):
                sizes = [Path(each).stat().st_size for each in row.pictures if isinstance(each, str | Path)]
                shown = f"{_names(row, self.folder)} {sizes}"
                total.update(f"{name} {row.turns} {row.kind} {row.choices} {shown}\n".encode())
        return total.hexdigest()


def read_rows(config: DataConfig) -> Rows:
    """Reads the conversations behind a config.

    Raises:
        DataError: no such file, another format, or rows that cannot be used, all of them told.
    """
    if config.dataset:
        from graft.llm_mm.datasets import built_in

        found, where = built_in(config.dataset), config.dataset
    else:
        found, where = read_file(config.path, config.format, config.images), config.path
    if config.system:
        told = Turn("system", (config.system,))
        found = [row if row.turns[0].role == "system" else replace(row, turns=(told, *row.turns)) for row in found]
    place = Path(config.images or config.path or ".").expanduser()
    folder = (place if place.is_dir() else place.parent).resolve()
    parts = _shared(found, config, folder)
    train = parts["train"][: config.limit or None]
    if not train:
        raise DataError(where, "no row is left to train on", "Lower data.validation and data.test, or add rows")
    return Rows(where, folder, tuple(train), tuple(parts["val"]), tuple(parts["test"]))


def _shared(rows: Sequence[Conversation], config: DataConfig, folder: Path) -> dict[str, list[Conversation]]:
    """Rows by part; those of one picture stay together. Nothing is drawn where the data declare parts."""
    names = [_names(row, folder) for row in rows]
    parts: dict[str, list[Conversation]] = {"train": [], "val": [], "test": []}
    groups = sorted(set(names), key=lambda name: hashlib.sha256(f"{config.seed}{name}".encode()).hexdigest())
    declared = any(row.part in ("val", "test") for row in rows)
    count = {"test": round(config.test * len(groups)), "val": round(config.validation * len(groups))}
    for part, share in (("test", config.test), ("val", config.validation)):
        count[part] = max(count[part], int(share > 0 and len(groups) > 2))
    drawn = dict.fromkeys(groups[: count["test"]], "test")
    drawn |= dict.fromkeys(groups[count["test"] : count["test"] + count["val"]], "val")
    for row, name in zip(rows, names, strict=True):
        parts[(row.part or "train") if declared else drawn.get(name, "train")].append(row)
    return parts


def _names(row: Conversation, folder: Path) -> str:
    """What tells a row's pictures from another's, wherever their folder stands; of a row without, its text."""
    if not row.pictures:
        return str(row.turns)
    told = (
        Path(each).relative_to(folder).as_posix()
        if isinstance(each, str | Path)
        else hashlib.sha256(each.tobytes()).hexdigest()
        for each in row.pictures
    )
    return "\n".join(told)
