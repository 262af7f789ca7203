"""Conversations about pictures from the files that people have: the format is found by looking at a row.

Every row becomes a `Conversation`. No picture is opened here; that happens when it is needed (`graft.llm_mm.pictures`).
What is wrong with a file is told for all its rows at once, each with its number, and with a row as it should be.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.llm_mm.conversations import Conversation, Role, Turn
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


def read_file(where: str, format: str = "auto", images: str = "") -> list[Conversation]:
    """Reads a file, or the table in a folder of pictures.

    Args:
        where: path of the file or folder.
        format: one of `FORMATS`; "auto" looks at the first row.
        images: folder that pictures are named in; empty is the file's own.

    Raises:
        DataError: no such file, another format, or rows that cannot be used, all of them told.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        tables = [path / name for name in _TABLES if (path / name).is_file()]
        if len(tables) != 1:
            found = ", ".join(table.name for table in tables) or "none"
            reason = f"the folder has {found} of {', '.join(_TABLES)}"
            raise DataError(where, reason, f"Put one into it, such as {_TABLES[0]} with {EXAMPLES['questions']}")
        path = tables[0]
    if not path.is_file():
        raise DataError(where, "there is no such file or folder", "Give a .json, .jsonl or .csv file")
    root = Path(images).expanduser() if images else path.parent
    problems: list[str] = []
    raw = list(_raw(path, problems))
    kind = format
    if kind == "auto":
        kind = detected(raw[0][1]) if raw else "questions"
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
    if path.suffix not in (".json", ".jsonl", ".csv"):
        raise DataError(str(path), f"{path.suffix or 'no suffix'} is not read", "Give a .json, .jsonl or .csv file")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(str(path), "it is not UTF-8 text", "Save it as UTF-8") from None
    if path.suffix == ".csv":
        number = 0
        try:
            for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 1):
                yield number, {str(key).strip().lower(): value for key, value in cells.items() if key}
        except csv.Error as error:
            problems.append(f"row {number + 1}: it is no CSV ({error})")
        return
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                str(path), f"it is no JSON ({error})", "Correct it, or save one row a line as .jsonl"
            ) from None
        if not isinstance(rows, list):
            raise DataError(str(path), "it is no list of rows", f"Write [{EXAMPLES['llava']}]")
        found: list[tuple[int, Any]] = list(enumerate(rows, 1))
    else:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found += [(number, json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                problems.append(f"row {number}: it is no JSON ({error})")
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
        side = _side(role)
        if not isinstance(text, str):
            raise _Wrong(f"the {role}'s words are {json.dumps(text)[:40]}, not text")
        parts: list[str | int] = []
        for k, piece in enumerate(re.split(rf"\s*{_PLACE}\s*", text)):
            if k:
                parts.append(used)
                used += 1
            if piece.strip():
                parts.append(piece.strip())
        if pictures and not marked and side == "user":
            parts, used, marked = [*range(len(pictures)), *parts], len(pictures), True
        turns.append(Turn(side, tuple(parts)))
    if used != len(pictures):
        raise _Wrong(f"{_PLACE} stands {used} times in it, and it names {len(pictures)} pictures")
    return _row(number, turns, pictures, row)


def _side(role: Any) -> Role:
    """Who speaks, by any of the names in use."""
    if not isinstance(role, str) or role not in _ROLES:
        raise _Wrong(f"{role!r} is nobody who speaks; there are {', '.join(_ROLES)}")
    return _ROLES[role]


def _row(number: int, turns: Sequence[Turn], pictures: Sequence[str], row: Mapping[str, Any]) -> Conversation:
    part = str(row.get("split") or row.get("part") or "").strip().lower()
    if part and part not in PARTS:
        raise _Wrong(f"split {part!r} is none of {', '.join(PARTS)}")
    choices = row.get("choices") or ()
    if not isinstance(choices, str | list | tuple):
        raise _Wrong(f"its choices are {json.dumps(choices)[:40]}, no list")
    choices = [str(choice).strip() for choice in (choices.split("|") if isinstance(choices, str) else choices)]
    if choices and turns[-1].text not in choices:
        raise _Wrong(f"its answer {turns[-1].text[:40]!r} is none of its choices {', '.join(choices)[:80]}")
    kind = str(row.get("kind") or row.get("category") or "")
    return Conversation(number, tuple(turns), tuple(pictures), kind, tuple(choices), PARTS.get(part, ""))


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
        if not isinstance(content, str | list | None):
            raise _Wrong(f"the {role}'s words are {json.dumps(content)[:40]}, neither text nor parts")
        parts: list[str | int] = []
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if not isinstance(piece, dict) or piece.get("type") not in ("text", "image", "image_url"):
                raise _Wrong(f"a part is {json.dumps(piece)[:60]}, neither text nor image")
            if piece["type"] == "text":
                parts += [text] if (text := str(piece.get("text") or "").strip()) else []
                continue
            named = piece.get("image_url", piece.get("image", piece.get("path", piece.get("url"))))
            named = named.get("url") if isinstance(named, dict) else named
            if named is None and len(pictures) < len(beside):
                named = beside[len(pictures)]
            if not isinstance(named, str):
                raise _Wrong(f"an image part names no file: {json.dumps(piece)[:60]}")
            parts.append(len(pictures))
            pictures.append(named)
        turns.append(Turn(_side(role), tuple(parts)))
    return _row(number, turns, pictures, row)


def _alpaca(number: int, row: Mapping[str, Any]) -> Conversation:
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _Wrong(f"{key!r} is empty")
    more, past = row.get("input") or "", row.get("history") or []
    if not isinstance(more, str):
        raise _Wrong(f"'input' is {json.dumps(more)[:40]}, not text")
    if not isinstance(past, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in past):
        raise _Wrong(f"'history' is {json.dumps(past)[:60]}, no list of [question, answer]")
    asked = "\n".join(text for text in (row["instruction"], more) if text.strip())
    history = [(side, text) for pair in past for side, text in zip(("user", "assistant"), pair, strict=True)]
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
    paths = []
    for name in row.pictures:
        if name.startswith("data:"):
            raise _Wrong(f"{name[:30]}... is a picture itself; save it as a file and name that")
        if "://" in name.removeprefix("file:"):
            raise _Wrong(f"{name[:40]} is on the network; nothing is fetched from there")
        try:
            path = (root / name.removeprefix("file:")).resolve()
            there = path.is_file()
        except (OSError, ValueError):
            raise _Wrong(f"{name[:40]!r} is no name of a file") from None
        if not path.is_relative_to(root.resolve()):
            raise _Wrong(f"{name} lies outside {root}; name its folder with data.images")
        if not there:
            raise _Wrong(f"there is no {name} in {root}")
        paths.append(str(path))
    return replace(row, pictures=tuple(paths))
