"""Conversations about pictures from the files that people have: the format is found by looking at a row.

Every row becomes a `Conversation`. No picture is opened here; that happens when it is needed (`graft.llm_mm.pictures`).
What is wrong with a file is told for all its rows at once, each with its number, and with a row as it should be.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graft.llm_mm.conversations import Conversation, Role, Turn
from graft.studio.config import require
from graft.studio.errors import DataError

FORMATS = ("llava", "sharegpt", "messages", "alpaca", "questions")
EXAMPLES = {
    "llava": '{"id": "1", "image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},'
    ' {"from": "gpt", "value": "A cat."}]}',
    "sharegpt": '{"images": ["cat.png"], "conversations": [{"from": "human", "value": "<image>What is this?"},'
    ' {"from": "gpt", "value": "A cat."}]}',
    "messages": '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}},'
    ' {"type": "text", "text": "What is this?"}]}, {"role": "assistant", "content": "A cat."}]}',
    "alpaca": '{"instruction": "What is this?", "input": "", "output": "A cat.", "images": ["cat.png"]}',
    "questions": '{"image": "cat.png", "question": "What is this?", "answer": "A cat."}',
}
"""A row of each format, as it should be."""
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system",
}  # fmt: skip
_PLACE = "<image>"
_TABLES = ("metadata.jsonl", "metadata.csv", "questions.jsonl", "questions.csv", "data.json", "data.jsonl")


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
        require("data.replay", self.replay, 0 <= self.replay < 1, "0 up to but not 1")
        require("data.limit", self.limit, self.limit >= 0, "0 or more")
        require("data.checked", self.checked, self.checked >= 1, "1 or more")
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


@dataclass(frozen=True)
class Rows:
    """The conversations of a data set, by part."""

    where: str
    """For messages."""
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

    @property
    def digest(self) -> str:
        """SHA-256 of the texts and the pictures' names, or bytes if they are in memory, part by part."""
        total = hashlib.sha256()
        for name in ("train", "val", "test"):
            for row in self.part(name):
                total.update(f"{name} {row.turns} {row.kind} {row.choices} {_names(row)}\n".encode())
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
        found, where = read_file(config), config.path
    if config.system:
        told = Turn("system", (config.system,))
        found = [row if row.turns[0].role == "system" else replace(row, turns=(told, *row.turns)) for row in found]
    parts = _shared(found, config)
    train = parts["train"][: config.limit or None]
    if not train:
        raise DataError(where, "no row is left to train on", "Lower data.validation and data.test, or add rows")
    return Rows(where, tuple(train), tuple(parts["val"]), tuple(parts["test"]))


def _shared(rows: Sequence[Conversation], config: DataConfig) -> dict[str, list[Conversation]]:
    """Rows by part; those of one picture stay together. Nothing is drawn where the data declare parts.

    Pictures go by their names in the data's folder, so that the parts are the same wherever it stands.
    """
    where = Path(config.images or config.path or ".").expanduser().resolve()
    root = f"{where if where.is_dir() else where.parent}/"
    names = [_names(row).replace(root, "") for row in rows]
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


def _names(row: Conversation) -> str:
    """What tells a row's pictures from another's; of a row without, its text."""
    if not row.pictures:
        return str(row.turns)
    told = (
        str(each) if isinstance(each, str | Path) else hashlib.sha256(each.tobytes()).hexdigest()
        for each in row.pictures
    )
    return "\n".join(told)


def read_file(config: DataConfig) -> list[Conversation]:
    """Reads a file, or the table in a folder of pictures.

    Raises:
        DataError: as `read_rows`.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        tables = [path / name for name in _TABLES if (path / name).is_file()]
        if len(tables) != 1:
            found = ", ".join(table.name for table in tables) or "none"
            reason = f"the folder has {found} of {', '.join(_TABLES)}"
            raise DataError(config.path, reason, f"Put one into it, such as {_TABLES[0]} with {EXAMPLES['questions']}")
        path = tables[0]
    if not path.is_file():
        raise DataError(config.path, "there is no such file or folder", "Give a .json, .jsonl or .csv file")
    root = Path(config.images).expanduser() if config.images else path.parent
    problems: list[str] = []
    raw = list(_raw(path, problems))
    kind = config.format
    if kind == "auto":
        kind = detected(raw[0][1]) if raw else "questions"  # type: ignore[assignment]
        if not kind:
            keys = ", ".join(map(str, raw[0][1]))
            known = "\n  ".join(EXAMPLES.values())
            raise DataError(
                str(path), f"row {raw[0][0]} has the keys {keys}, which no format has", f"Known:\n  {known}"
            )
    rows = []
    for number, row in raw:
        try:
            rows.append(_checked(_READERS[kind](number, row), root))
        except _Wrong as error:
            problems.append(f"row {number}: {error}")
    if not raw and not problems:
        problems.append("it holds no rows")
    if problems:
        shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        reason = "\n  ".join([f"{len(problems)} problem{'s' * (len(problems) > 1)} (format {kind}):", *shown])
        raise DataError(str(path), reason + "\n", f"A row that is right:\n  {EXAMPLES[kind]}")
    return rows


def detected(row: Mapping[str, Any]) -> str:
    """Returns the format of a row; empty for none."""
    if "conversations" in row:
        return "llava" if "image" in row else "sharegpt"
    if "messages" in row:
        return "messages"
    if "instruction" in row:
        return "alpaca"
    return "questions" if "question" in row else ""


class _Wrong(Exception):
    """What is wrong with one row."""


def _raw(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a file, counted from 1."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(str(path), "it is not UTF-8 text", "Save it as UTF-8") from None
    if path.suffix == ".csv":
        for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 1):
            yield number, {str(key).strip().lower(): value for key, value in cells.items() if key}
        return
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(
                str(path), f"it is no JSON ({error})", "Correct it, or save one row a line as .jsonl"
            ) from None
        if not isinstance(rows, list):
            raise DataError(str(path), "it is no list of rows", f"Write [{EXAMPLES['llava']}]")
        found: list[tuple[int, Any]] = list(enumerate(rows, 1))
    elif path.suffix == ".jsonl":
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found += [(number, json.loads(line))] if line.strip() else []
            except ValueError as error:
                problems.append(f"row {number}: it is no JSON ({error})")
    else:
        raise DataError(str(path), f"{path.suffix or 'no suffix'} is not read", "Give a .json, .jsonl or .csv file")
    for number, row in found:
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"row {number}: it is no object but {json.dumps(row)[:40]}")


def _listed(value: Any) -> list[str]:
    """Names of pictures: none, one, or several."""
    if value in (None, "", []):
        return []
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in found):
        raise _Wrong(f"its pictures are {json.dumps(value)[:60]}, not paths")
    return found


def _placed(
    sides: Sequence[tuple[Any, Any]], pictures: Sequence[str], number: int, row: Mapping[str, Any]
) -> Conversation:
    """Turns whose text marks the pictures' places with `<image>`; without any mark they come first."""
    turns, used = list[Turn](), 0
    marked = any(_PLACE in str(text) for _, text in sides)
    for role, text in sides:
        if role not in _ROLES:
            raise _Wrong(f"{role!r} is nobody who speaks; there are {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise _Wrong(f"the {role}'s words are {json.dumps(text)[:40]}, not text")
        parts: list[str | int] = []
        for k, piece in enumerate(re.split(rf"\s*{_PLACE}\s*", text)):
            if k:
                parts.append(used)
                used += 1
            if piece.strip():
                parts.append(piece.strip())
        if pictures and not marked and _ROLES[role] == "user":
            parts, used, marked = [*range(len(pictures)), *parts], len(pictures), True
        turns.append(Turn(_ROLES[role], tuple(parts)))
    if used != len(pictures):
        raise _Wrong(f"{_PLACE} stands {used} times in it, and it names {len(pictures)} pictures")
    return _row(number, turns, pictures, row)


def _row(number: int, turns: Sequence[Turn], pictures: Sequence[str], row: Mapping[str, Any]) -> Conversation:
    part = str(row.get("split") or row.get("part") or "").strip().lower()
    if part and part not in PARTS:
        raise _Wrong(f"split {part!r} is none of {', '.join(PARTS)}")
    choices = row.get("choices") or ()
    if isinstance(choices, str):
        choices = [choice.strip() for choice in choices.split("|")]
    kind = str(row.get("kind") or row.get("category") or "")
    return Conversation(number, tuple(turns), tuple(pictures), kind, tuple(map(str, choices)), PARTS.get(part, ""))


def _sides(row: Mapping[str, Any], key: str, names: tuple[str, str]) -> list[tuple[Any, Any]]:
    said = row.get(key)
    if not isinstance(said, list) or not said or not all(isinstance(turn, dict) for turn in said):
        raise _Wrong(f"{key!r} is no list of turns")
    for k, turn in enumerate(said, 1):
        if missing := [name for name in names if name not in turn]:
            raise _Wrong(f"turn {k} has no {missing[0]!r}")
    sides = [(turn[names[0]], turn[names[1]]) for turn in said]
    return [("system", row["system"]), *sides] if row.get("system") else sides


def _llava(number: int, row: Mapping[str, Any]) -> Conversation:
    return _placed(_sides(row, "conversations", ("from", "value")), _listed(row.get("image")), number, row)


def _sharegpt(number: int, row: Mapping[str, Any]) -> Conversation:
    pictures = _listed(row.get("images", row.get("image")))
    return _placed(_sides(row, "conversations", ("from", "value")), pictures, number, row)


def _messages(number: int, row: Mapping[str, Any]) -> Conversation:
    sides = _sides(row, "messages", ("role", "content"))
    if all(isinstance(content, str) for _, content in sides):
        return _placed(sides, _listed(row.get("images", row.get("image"))), number, row)
    turns, pictures, beside = list[Turn](), list[str](), _listed(row.get("images"))
    for role, content in sides:
        if role not in _ROLES:
            raise _Wrong(f"{role!r} is nobody who speaks; there are {', '.join(_ROLES)}")
        parts: list[str | int] = []
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if not isinstance(piece, dict) or piece.get("type") not in ("text", "image", "image_url"):
                raise _Wrong(f"a part is {json.dumps(piece)[:60]}, neither text nor image")
            if piece["type"] == "text":
                parts += [str(piece.get("text", "")).strip()] if str(piece.get("text", "")).strip() else []
                continue
            named = piece.get("image_url", piece.get("image", piece.get("path", piece.get("url"))))
            named = named.get("url") if isinstance(named, dict) else named
            if named is None and len(pictures) < len(beside):
                named = beside[len(pictures)]
            if not isinstance(named, str):
                raise _Wrong(f"an image part names no file: {json.dumps(piece)[:60]}")
            parts.append(len(pictures))
            pictures.append(named)
        turns.append(Turn(_ROLES[role], tuple(parts)))
    return _row(number, turns, pictures, row)


def _alpaca(number: int, row: Mapping[str, Any]) -> Conversation:
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _Wrong(f"{key!r} is empty")
    asked = "\n".join(text for text in (row["instruction"], row.get("input") or "") if text.strip())
    history = [
        (side, text)
        for pair in row.get("history") or ()
        for side, text in zip(("user", "assistant"), pair, strict=True)
    ]
    system = [("system", row["system"])] if row.get("system") else []
    sides = [*system, *history, ("user", asked), ("assistant", row["output"])]
    return _placed(sides, _listed(row.get("images", row.get("image"))), number, row)


def _questions(number: int, row: Mapping[str, Any]) -> Conversation:
    pictures = _listed(
        next((row[key] for key in ("image", "file_name", "file", "path", "images") if row.get(key)), None)
    )
    if isinstance(row.get("image"), str) and "|" in row["image"]:
        pictures = [name.strip() for name in row["image"].split("|")]
    for key in ("question", "answer"):
        if row.get(key) is None or not str(row[key]).strip():
            raise _Wrong(f"{key!r} is empty")
    return _placed([("user", str(row["question"])), ("assistant", str(row["answer"]))], pictures, number, row)


_READERS: dict[str, Callable[[int, Mapping[str, Any]], Conversation]] = {
    "llava": _llava, "sharegpt": _sharegpt, "messages": _messages, "alpaca": _alpaca, "questions": _questions,
}  # fmt: skip


def _checked(row: Conversation, root: Path) -> Conversation:
    """The row with its pictures' paths, if its sides speak in turn and its pictures are there."""
    sides = [turn.role for turn in row.turns]
    if "system" in sides[1:]:
        raise _Wrong("the system speaks in the middle")
    spoken = sides[sides[0] == "system" :]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise _Wrong(f"the sides speak as {', '.join(spoken)}; they must take turns, the assistant last")
    for turn in row.turns:
        if not turn.parts or (turn.role == "assistant" and not turn.text):
            raise _Wrong(f"a turn of the {turn.role} is empty")
        if turn.role != "user" and any(isinstance(part, int) for part in turn.parts):
            raise _Wrong(f"the {turn.role} shows a picture; only the user can")
    if any("://" in name or name.startswith("data:") for name in row.pictures):
        raise _Wrong(f"{row.pictures[0][:40]} is on the network; nothing is fetched from there")
    paths = []
    for name in row.pictures:
        path = (root / name.removeprefix("file:")).resolve()
        if not path.is_relative_to(root.resolve()):
            raise _Wrong(f"{name} lies outside {root}; name its folder with data.images")
        if not path.is_file():
            raise _Wrong(f"there is no {name} in {root}")
        paths.append(str(path))
    return replace(row, pictures=tuple(paths))
