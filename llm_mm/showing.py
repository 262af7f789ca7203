"""The studio's preview of multimodal language models: a conversation about pictures, by base and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.llm_mm.previews import PreviewConfig, chat
from graft.studio.config import from_dict
from graft.studio.shown import Asked, Shown

if TYPE_CHECKING:
    from graft.llm_mm.base import MultimodalBase
    from graft.studio.adapter import Adapter


def shown(base: MultimodalBase, adapters: Sequence[Adapter], asked: Asked, out: Path) -> list[Shown]:
    """Asks the questions in order as one conversation, a row for each, a column for the base and for each adapter.

    Args:
        base: the adapters' own.
        adapters: each talks by itself.
        asked: the questions as prompts; the pictures are shown with the first. The seed counts with a temperature.
        out: not used: answers are words.

    Raises:
        InputError: a file that is no picture, or settings out of range.
    """
    config = from_dict(PreviewConfig, asked.settings, "preview")
    cells = []
    for number, adapter in enumerate(adapters, 1):
        rows = chat(base, adapter, asked.pictures, asked.prompts, config.tokens, config.drawing(asked.seed))
        name = adapter.card.method if len(adapters) == 1 else f"{number}: {adapter.card.method}"
        for turn, row in enumerate(rows, 1):
            question = f"{turn}. {row['question']}"
            cells += [Shown(question, "base", text=row["base"])] if number == 1 else []
            cells.append(Shown(question, name, text=row["adapter"]))
    return cells
