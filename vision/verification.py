"""Does stock timm, or peft, make of an adapter's file what is made of it here?

An adapter that is a change of weights is written as a whole model with its new classifier, which timm loads by itself.
Logits of the same pictures are compared, and `change` is that beside the same classifier on the features of the base.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.studio.outside import REFUSALS, compare_in_peft, likeness, refusal
from graft.vision.base import save_base
from graft.vision.method import VisionMethod

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.vision.base import VisionBase


@torch.no_grad()
def compare(base: VisionBase, adapter: Adapter, source: Path | None = None) -> dict[str, Any] | str:
    """Compares logits; the base is as before afterwards.

    Args:
        base: of the adapter; nothing is attached.
        adapter: to compare.
        source: the file it was read from, which peft reads too if it is one of peft's.

    Returns:
        `library`, `file`, `change`, `error` and `same`, or `refused`, the library's message; or why nothing is
        compared.
    """
    import timm

    from graft.studio.registry import method_class

    shape = 2, 3, base.side, base.side
    pixels = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(base.device)

    def run(model: Any) -> Tensor:
        logits: Tensor = model(pixels)
        return logits.float().cpu()

    if not adapter.card.details.get("classes"):
        return compare_in_peft(base, adapter, source, run)
    method: Any = method_class("vision", adapter.card.method)
    assert issubclass(method, VisionMethod)
    if "timm" not in method.exports:
        return f"{adapter.card.method} is no change of weights, and is written in no other library's format"
    with tempfile.TemporaryDirectory() as written:
        with adapter.attached(base) as handle:
            ours = run(base.model)
            handle.scale(0, 0.0)
            plain = run(base.model)
            handle.scale(0, 1.0)
            handle.merge()
            folder = save_base(base, Path(written) / "model")
        told = {"library": "timm", "file": "model.safetensors"}
        try:
            theirs = run(timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(base.device))
        except REFUSALS as error:
            return told | refusal(error)
    return told | likeness(plain, ours, theirs)
