"""A LLaVA-style adapter as a folder of peft: LoRA's factors, and the projector among its saved modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.parts import part_of
from graft.studio.adapter import Adapter
from graft.studio.errors import InputError
from graft.studio.formats.low_rank import from_adapter
from graft.studio.formats.peft import config, keys
from graft.studio.formats.peft_folder import PREFIX, write_folder


def export(method: LlavaTuning, adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads.

    Raises:
        InputError: a part beyond the projector is trained in full, or none by LoRA.
    """
    full = {part for part, way in method.ways.items() if way == "full"}
    if full - {"projector"} or "lora" not in method.ways.values():
        given = ", ".join(f"{part} {way}" for part, way in method.ways.items())
        raise InputError(given, "to peft this is no adapter: it has no LoRA, or too much beside it", "Use transformers")
    sites = [site for site in adapter.card.sites if f"{site['name']}.A" in adapter.tensors]
    lora = replace(adapter, card=replace(adapter.card, sites=sites))
    modules = from_adapter(lora)
    written = config(modules, adapter.card.base)
    tensors = keys(modules)
    saved = {name: tensor for name, tensor in adapter.tensors.items() if part_of(name) == "projector"} if full else {}
    if saved:
        written["modules_to_save"] = sorted({_module(name) for name in saved})
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    return write_folder(folder, written, tensors, adapter.card)


def _module(name: str) -> str:
    """The projector's own path in that of one of its weights."""
    path = name.split(".")
    end = next(k for k in range(1, len(path) + 1) if part_of(".".join(path[:k])) == "projector")
    return ".".join(path[:end])
