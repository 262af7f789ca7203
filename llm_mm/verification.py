"""Does an adapter's file make of the model what is made of it here? Loaded by peft, on pictures and a question."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graft.llm_mm.method import sample_logits
from graft.studio.outside import compare_in_peft

if TYPE_CHECKING:
    from graft.llm_mm.base import MultimodalBase
    from graft.studio.adapter import Adapter


def compare(base: MultimodalBase, adapter: Adapter, source: Path | None = None) -> dict[str, Any] | str:
    """Compares logits. See `graft.studio.outside.compare_in_peft`."""
    length = sample_logits(base).shape[1]

    def run(model: Any) -> Tensor:
        """Of the sequence itself: some versions of peft also give those of its prompts, which stand before it."""
        return sample_logits(replace(base, model=model))[:, -length:]

    return compare_in_peft(base, adapter, source, run)
