"""What is answered with an adapter and without it: in words, and as a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig
from graft.llm_mm.method import model_inputs
from graft.llm_mm.task import Reader
from graft.studio.disk import write_json
from graft.studio.errors import InputError
from graft.studio.pictures import find_pictures

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

_SIDE, _LINE, _COLUMNS, _WIDTH = 160, 14, 4, 220


@dataclass(frozen=True)
class PreviewConfig:
    """The settings of `graft preview`."""

    path: str = ""
    """A picture, or a folder of pictures."""
    pictures: int = 8
    """How many of a folder are shown, the first by name."""
    tokens: int = 32
    """Most tokens of an answer."""


@torch.no_grad()
def answered(reader: Reader, rows: Sequence[Conversation], tokens: int = 32) -> list[str]:
    """Returns the greedy answers to conversations that end with a question, each by itself."""
    base, tokenizer = reader.base, reader.writer.tokenizer
    found = []
    for row in rows:
        ids = torch.tensor([reader.writer.prompt(row, reader.store.expand)], device=base.device)
        shown = [row.pictures[part] for turn in row.turns for part in turn.parts if isinstance(part, int)]
        given = model_inputs(base, ids, torch.ones_like(ids), reader.store.inputs(shown))
        out = base.model.generate(**given, do_sample=False, max_new_tokens=tokens)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def chat(
    base: MultimodalBase, adapter: Adapter | None, pictures: Sequence[Any], questions: Sequence[str], tokens: int = 32
) -> list[dict[str, str]]:
    """Asks questions as one conversation, without the adapter and with it, each side with its own answers before it.

    Args:
        base: the adapter's own.
        adapter: None asks the base alone.
        pictures: shown with the first question.
        questions: in order.
        tokens: most of an answer.

    Returns:
        For each question `question`, `base` and, with an adapter, `adapter`.
    """
    details = adapter.card.details if adapter is not None else {}
    known = {key: str(details[key]) for key in ("fit", "background", "system") if details.get(key)}
    reader = Reader.of(base, DataConfig(path="-", **known))  # type: ignore[arg-type]
    rows = [{"question": question} for question in questions]
    for side in ("base", "adapter") if adapter is not None else ("base",):
        turns: list[Turn] = [Turn("system", (known["system"],))] if "system" in known else []
        with adapter.attached(base) if adapter is not None and side == "adapter" else nullcontext():
            for k, question in enumerate(questions):
                turns.append(Turn("user", (*(range(len(pictures)) if k == 0 else ()), question)))
                (told,) = answered(reader, [Conversation(k + 1, tuple(turns), tuple(pictures))], tokens)
                turns.append(Turn("assistant", (told or " ",)))
                rows[k][side] = told
    return rows


def preview(
    base: MultimodalBase,
    adapter: Adapter,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    config: PreviewConfig,
) -> list[Path]:
    """Asks questions about pictures with the adapter and without.

    Args:
        base: the adapter's own.
        adapter: of this domain.
        prompts: questions; each is asked about every picture.
        seeds: not used: answers are the likeliest ones.
        out: folder.
        config: which pictures.

    Returns:
        `sheet.png`, pictures with question and both answers below, and `answers.json`.

    Raises:
        InputError: no pictures or no questions were named.
    """
    path = Path(config.path)
    files = (find_pictures(path) if path.is_dir() else [path] if path.is_file() else []) if config.path else []
    if not files:
        raise InputError(config.path or "preview.path", "there are no pictures", "Name some with --set path=PICTURES")
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("graft preview", "there is no question", 'Ask with --prompt "what is this ?"')
    rows, shown, lines = list[dict[str, str]](), [], []
    reader = Reader.of(base, DataConfig(path="-"))
    for file in files[: config.pictures]:
        for question in prompts:
            (told,) = chat(base, adapter, [str(file)], [question], config.tokens)
            rows.append({"picture": str(file), **told})
            shown.append(reader.store.open(str(file)))
            lines.append([question, f"without: {told['base']}", f"with: {told['adapter']}"])
    out.mkdir(parents=True, exist_ok=True)
    sheet(shown, lines, out / "sheet.png")
    write_json(out / "answers.json", rows)
    return [out / "sheet.png", out / "answers.json"]


def sheet(pictures: Sequence[Image.Image], lines: Sequence[Sequence[str]], path: Path) -> None:
    """Draws pictures with lines of text below each."""
    count = max(map(len, lines))
    height = _SIDE + _LINE * count + 12
    canvas = Image.new("RGB", (min(len(pictures), _COLUMNS) * _WIDTH, -(-len(pictures) // _COLUMNS) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (picture, told) in enumerate(zip(pictures, lines, strict=True)):
        x, y = k % _COLUMNS * _WIDTH + 4, k // _COLUMNS * height + 4
        canvas.paste(picture.resize((_SIDE, _SIDE)), (x, y))
        for row, line in enumerate(told):
            draw.text((x, y + _SIDE + 2 + _LINE * row), line[:36], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
