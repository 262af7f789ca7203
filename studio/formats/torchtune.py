"""LoRA and DoRA of a Llama as torchtune keeps them: ``layers.0.attn.q_proj.lora_a.weight``, ``lora_b.weight`` and
``magnitude``, ``adapter_config.json`` beside it.

torchtune writes ``adapter_<epoch>.pt``, a pickle; the file here is the same as safetensors. In its Llama, Mistral and
Gemma neighbouring numbers of a head turn together, in transformers those half a head apart, so the rows of B of q and k
(and their lengths) stand in another order (not so in its Qwen and Phi, which are not for this file):

    B of transformers = B of torchtune as (heads, width / 2, 2, r), the middle two exchanged

The width of a head is in neither of its files; it stands as ``head_dim`` in the config that we write and in the details
of our card, or is told (``graft adapters convert --head-dim``).
The scale is multiplied into B, and as torchtune has one rank, smaller ones are filled with zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.studio.adapter import Adapter
from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import provenance
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.low_rank import (
    LowRank,
    check_lengths,
    check_written,
    from_adapter,
    low_rank,
    pair,
    split_lengths,
    to_adapter,
)
from graft.studio.formats.peft_folder import CONFIG, read_config

FILE = "adapter_0.safetensors"
_ENDS = (".lora_a.weight", ".lora_b.weight")
_LENGTH = ".magnitude"
_TURNED = ("attn.q_proj", "attn.k_proj")
_HEAD = "torchtune orders the rows of q and k within heads"
_TELL = "tell it as the model's config has it: graft adapters convert --head-dim, or load_adapter(path, head_dim=...)"

# transformers' name of a module in a layer -> torchtune's.
_NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_BACK = {theirs: ours for ours, theirs in _NAMES.items()}


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is torchtune's."""
    return any(key.endswith(_ENDS) for key in keys)


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes both files.

    Raises:
        InputError: modules that a Llama of transformers does not have or torchtune does not adapt by themselves, or
            q and k without the width of a head in the card's details.
    """
    modules = from_adapter(adapter)
    names = {_name(name, module): name for name, module in modules.items()}
    targets = _targets(names)
    rank = max(module.rank for module in modules.values())
    head = adapter.card.details.get("head_dim")
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    tensors: dict[str, Tensor] = {}
    for name, ours in names.items():
        module = modules[ours].padded(rank)
        rows = [(_ENDS[1], module.up), *([] if module.length is None else [(_LENGTH, module.length)])]
        if name.endswith(_TURNED):
            if not head:
                raise InputError(ours, f"{_HEAD}, and the adapter does not say how wide one is", _TELL)
            config["head_dim"] = head
            rows = [(end, _exchanged(_heads(each, head, ours), (2, head // 2))) for end, each in rows]
        tensors |= {f"{name}{end}": each for end, each in [(_ENDS[0], module.down), *rows]}
    path = write_tensors(folder / FILE, tensors, {"format": "pt", **provenance.header(adapter.card)})
    paths = [path, write_atomic(folder / CONFIG, json.dumps(config, indent=2).encode())]
    check_written(adapter, _read(path)[0], str(path))
    return paths


def read(path: Path, head_dim: int | None = None) -> Adapter:
    """Reads a file with the ``adapter_config.json`` beside it; ``head_dim`` is for one that does not tell it.

    Raises:
        FormatError: names of another model, keys beside the factors, or a config that does not say enough.
    """
    modules, details = _read(path, head_dim)
    return to_adapter(modules, "", str(path), details)


def _read(path: Path, told: int | None = None) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """Factors by transformers' names, and the details for the card."""
    config, where = read_config(path.parent), str(path)
    head = config.get("head_dim", told)
    if told not in (None, head):
        raise InputError(f"head_dim {told}", f"{path.with_name(CONFIG)} says {head}", "leave it out, or correct that")
    modules = {}
    lengths, factors = split_lengths(read_tensors(path)[0], _LENGTH)
    pairs = pair(factors, *_ENDS, where)
    check_lengths(lengths, pairs, where)
    for name, (down, up) in pairs.items():
        length = lengths.get(name)
        if name.endswith(_TURNED):
            if not isinstance(head, int):
                raise FormatError(str(path.with_name(CONFIG)), f"{_HEAD}, and does not say how wide one is", _TELL)
            up = _exchanged(_heads(up, head, name), (head // 2, 2))
            length = None if length is None else _exchanged(_heads(length, head, name), (head // 2, 2))
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name != "output" and (found is None or found[2] not in _BACK):
            raise FormatError(f"{where}: {name}", "no module of torchtune's Llama", "only Llama's names are read")
        ours = "lm_head" if found is None else f"model.layers.{found[1]}.{_BACK[found[2]]}"
        if "lora_alpha" not in config:
            raise FormatError(str(path.with_name(CONFIG)), "it does not say lora_alpha", "write it again")
        modules[ours] = replace(low_rank(down, up, config["lora_alpha"] / down.shape[0]), length=length)
    return modules, {"head_dim": head} if head else {}


def _heads(rows: Tensor, head: int, where: str) -> Tensor:
    """Rows of B, or their lengths, by heads: (heads, width, ...)."""
    if head < 2 or head % 2 or rows.shape[0] % head:
        reason = f"heads of {rows.shape[0]} rows in all are not {head} wide"
        raise InputError(f"head_dim {head}", f"{where}: {reason}", "give the head_dim of the model's config")
    return rows.unflatten(0, (-1, head))


def _exchanged(heads: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Rows again, those of each head taken as a table of these sizes and its two dimensions exchanged."""
    return heads.unflatten(1, sizes).transpose(1, 2).flatten(0, 2)


def _name(path: str, module: LowRank) -> str:
    """torchtune's name of a module of transformers' Llama."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if module.kind != "linear" or (path != "lm_head" and (found is None or found[2] not in _NAMES)):
        remedy = "attach to linear layers of transformers' Llama, or use native or peft"
        raise InputError(path, "torchtune has no LoRA of it", remedy)
    return "output" if found is None else f"layers.{found[1]}.{_NAMES[found[2]]}"


def _targets(names: Iterable[str]) -> list[str]:
    """The kinds of modules, which torchtune adapts in every layer and, in the feed-forward part, together."""
    layers: dict[str, set[int]] = {}
    for name in names:
        if name != "output":
            layers.setdefault(name.split(".", 2)[2], set()).add(int(name.split(".")[1]))
    count = 1 + max((layer for found in layers.values() for layer in found), default=-1)
    for kind, found in layers.items():
        if lacking := set(range(count)) - found:
            where = f"layers.{min(lacking)}.{kind}"
            raise InputError(where, "torchtune adapts it in every layer", "use native or peft")
    mlp = {kind for kind in layers if kind.startswith("mlp.")}
    if len(mlp) in (1, 2):
        raise InputError(", ".join(sorted(mlp)), "torchtune adapts gate, down and up together", "use native or peft")
    return [kind.rpartition(".")[2] for kind in layers] + ["output"] * ("output" in names)
