"""Prompt and prefix tuning in peft's folders: one tensor, ``prompt_embeddings``, for the model's one decoder.

A prompt is (length, width); a prefix (length, layers * 2 * heads * width of a head), what a network may have made of
rows being written out. The file does not name the decoder: the adapter that is read goes to the only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.studio.adapter import Adapter, Card
from graft.studio.config import from_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.formats.files import read_tensors
from graft.studio.formats.peft_folder import FILE, write_folder
from graft.studio.methods.prefix_tuning import PrefixSlot, PrefixTuning
from graft.studio.sites import Plan, Site

_KEY = "prompt_embeddings"


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads.

    Raises:
        InputError: another place than one decoder of transformers, for which peft has none.
    """
    site, *more = Plan.from_list(adapter.card.sites)
    if more or site.role != "decoder":
        reason = f"peft has {adapter.card.method} for one decoder of transformers only"
        raise InputError(site.key, reason, "use native")
    config: dict[str, Any] = {
        "base_model_name_or_path": adapter.card.base,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    if site.kind == "kv":
        values = _prefix(adapter, site)
        layers, _, heads, width, _ = site.shape
        config |= {"peft_type": "PREFIX_TUNING", "num_layers": layers, "token_dim": heads * width}
        config |= {"num_attention_heads": heads, "prefix_projection": False}
    else:
        values = adapter.tensors[f"{site.key}.P"]
        config |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": site.shape[0]}
    return write_folder(folder, config | {"num_virtual_tokens": len(values)}, {_KEY: values}, adapter.card)


def _prefix(adapter: Adapter, site: Site) -> Any:
    """The prefix itself, (length, layers * 2 * heads * width)."""
    slot = PrefixSlot(site, 1, from_dict(PrefixTuning, adapter.card.config, "adapter.json"))
    slot.load_state_dict({name: adapter.tensors[f"{site.key}.{name}"][None] for name, _ in slot.named_parameters()})
    return slot.flat()[0]


def read(folder: Path, settings: Mapping[str, Any]) -> Adapter:
    """Reads what peft wrote.

    Raises:
        FormatError: other tensors, or those of an encoder and a decoder.
    """
    tensors, _ = read_tensors(folder / FILE)
    if other := set(tensors) ^ {_KEY}:
        raise FormatError(f"{folder / FILE}: {min(other)}", f"expected {_KEY} and nothing else", "export it again")
    values = tensors[_KEY].float()
    if settings.get("num_transformer_submodules") not in (None, 1) or values.dim() != 2:
        reason = "prompts of an encoder and a decoder are not read"
        raise FormatError(str(folder), reason, "use a model with a decoder only")
    if settings["peft_type"] == "PROMPT_TUNING":
        return Adapter({"P": values}, Card("prompt_tuning", {"length": len(values)}))
    return Adapter({"E": values}, Card("prefix_tuning", {"length": len(values), "hidden": None}))
