"""Does an adapter's file make of both towers what is made of them here? Loaded by peft, on pictures and texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.studio.outside import compare_in_peft

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.vlm.base import ClipBase

TEXTS = ("a photo of a cat.", "a red car on a road")


def compare(base: ClipBase, adapter: Adapter, source: Path | None = None) -> dict[str, Any] | str:
    """Compares features of pictures and texts, side by side. See `graft.studio.outside.compare_in_peft`."""
    side = base.preprocess.size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(base.device)
    ids = base.words(TEXTS).to(base.device)

    def run(model: Any) -> Tensor:
        if hasattr(model, "encode_image"):
            found = model.encode_image(pixels), model.encode_text(ids)
        else:
            found = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)
        return torch.cat([getattr(each, "pooler_output", each).flatten() for each in found]).float().cpu()

    return compare_in_peft(base, adapter, source, run)
