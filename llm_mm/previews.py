"""What is answered with an adapter and without it: in words, and as a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig
from graft.llm_mm.method import model_inputs
from graft.llm_mm.task import Reader
from graft.studio.config import require
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
    temperature: float = 0.0
    """Answers are drawn, the more freely the higher it is; 0 takes the likeliest token every time."""

    def __post_init__(self) -> None:
        require("preview.tokens", self.tokens, self.tokens >= 1, "1 or more")
        require("preview.temperature", self.temperature, 0 <= self.temperature <= 4, "0 to 4")

    def drawing(self, seed: int) -> Drawing | None:
        """How tokens are drawn; None where the likeliest one is taken."""
        return Drawing(self.temperature, seed) if self.temperature else None


@dataclass(frozen=True)
class Drawing:
    """Tokens drawn from the model's own probabilities, made flatter or steeper."""

    temperature: float
    """Logits are divided by it."""
    seed: int = 0
    """Of the first answer; the next ones have the next numbers."""


@torch.no_grad()
def answered(
    reader: Reader, rows: Sequence[Conversation], tokens: int = 32, drawing: Drawing | None = None
) -> list[str]:
    """Returns the answers to conversations that end with a question, each by itself; None draws nothing."""
    base, tokenizer = reader.base, reader.writer.tokenizer
    how: dict[str, Any] = {"do_sample": False}
    if drawing is not None:  # what a model's own settings cut off stays possible: the probabilities alone decide
        how = {"do_sample": True, "temperature": drawing.temperature, "top_k": 0, "top_p": 1.0}
    found = []
    for row in rows:
        ids = torch.tensor([reader.writer.prompt(row, reader.store.expand)], device=base.device)
        shown = [row.pictures[part] for turn in row.turns for part in turn.parts if isinstance(part, int)]
        given = model_inputs(base, ids, torch.ones_like(ids), reader.store.inputs(shown))
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            if drawing is not None:
                torch.manual_seed(drawing.seed + row.number - 1)
            out = base.model.generate(**given, **how, max_new_tokens=tokens)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def chat(
    base: MultimodalBase, adapter: Adapter | None, pictures: Sequence[Any], questions: Sequence[str],
    tokens: int = 32, drawing: Drawing | None = None,
) -> list[dict[str, str]]:  # fmt: skip
    """Asks questions as one conversation, without the adapter and with it, each side with its own answers before it.

    Args:
        base: the adapter's own.
        adapter: None asks the base alone.
        pictures: shown with the first question.
        questions: in order.
        tokens: most of an answer.
        drawing: None takes the likeliest tokens.

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
                (told,) = answered(reader, [Conversation(k + 1, tuple(turns), tuple(pictures))], tokens, drawing)
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
        seeds: one answer for each, if `config.temperature` is above 0; else the likeliest answer alone.
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
        for question, seed in product(prompts, seeds if config.temperature else seeds[:1]):
            (told,) = chat(base, adapter, [str(file)], [question], config.tokens, config.drawing(seed))
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
