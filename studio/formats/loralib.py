"""LoRA as the authors' loralib keeps it: ``<module>.lora_A`` and ``<module>.lora_B`` in a state dict.

loralib has layers for linear maps, embeddings and packed projections (``MergedLinear``: the A of all enabled parts one
below the other, and their B likewise). Neither alpha nor the kind of a layer is in the state dict; they stand in the
file's header as JSON, where ``embedding`` and ``enable_lora`` may be left out:

    loralib = {"lora_alpha": 8, "embedding": ["wte"], "enable_lora": {"attn.c_attn": [true, false, true]}}

We write alpha equal to the rank, with the scale multiplied into B. Its convolutions are no product of our factors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.studio.adapter import Adapter
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import provenance
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.low_rank import LowRank, block_diagonal, by_module, check_written, pair, to_adapter
from graft.studio.sites import nearest

FILE = "loralib.safetensors"
_HEADER, _ENDS = "loralib", (".lora_A", ".lora_B")
_REMEDY = """write it with save_file(tensors, path, {"loralib": '{"lora_alpha": 8}'}), and see the documentation"""


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is loralib's."""
    return any(key.endswith(_ENDS) for key in keys)


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a state dict for layers with ``lora_alpha`` equal to ``r``.

    Raises:
        InputError: convolutions and torch's MultiheadAttention, for which loralib has no layer of this form.
    """
    modules = by_module(adapter)
    rank = max(part.rank for parts in modules.values() for _, part in parts)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"lora_alpha": rank, "embedding": [], "enable_lora": {}}
    for name, parts in modules.items():
        site, kind = parts[0][0], parts[0][1].kind
        if kind not in ("linear", "embedding"):
            raise InputError(name, f"loralib has no such LoRA of a site of kind {kind}", "use native or peft")
        if kind == "embedding":
            header["embedding"].append(name)
        if site.rows is not None:
            starts, size = {site.rows[0] for site, _ in parts if site.rows}, site.covered[0]
            header["enable_lora"][name] = [start in starts for start in range(0, site.shape[0], size)]
        wide = [part.padded(rank) for _, part in parts]
        tensors[f"{name}.lora_A"] = torch.cat([part.down for part in wide])
        tensors[f"{name}.lora_B"] = torch.cat([part.up for part in wide])
    told = {"format": "pt", _HEADER: json.dumps(header, sort_keys=True), **provenance.header(adapter.card)}
    path = write_tensors(folder / FILE, tensors, told)
    check_written(adapter, _read(path), str(path))
    return [path]


def read(path: Path) -> Adapter:
    """Reads a state dict of factors, or a whole model's, of which the base's part is left aside.

    Raises:
        FormatError: no header, keys that are neither, or trained biases.
    """
    return to_adapter(_read(path), "", str(path))


def _read(path: Path) -> dict[str, LowRank]:
    tensors, metadata = read_tensors(path)
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in f".{key}"}
    pairs = pair(factors, *_ENDS, str(path))
    header = _header(metadata, pairs, str(path))
    if others := [key for key in tensors if key not in factors]:
        if lacking := [name for name in pairs if f"{name}.weight" not in tensors]:
            reason = f"no factor, and without {lacking[0]}.weight this is no whole model: trained biases are not read"
            raise FormatError(f"{path}: {others[0]}", reason, "leave it out if it is the base's")
        warnings.warn(f"{path}: {len(others)} tensors beside the factors are taken for the base's", stacklevel=5)
    return {name: _module(name, down, up, header, path) for name, (down, up) in pairs.items()}


def _module(name: str, down: Tensor, up: Tensor, header: Mapping[str, Any], path: Path) -> LowRank:
    """Factors of one module, with their scale."""
    enabled = header["enable_lora"].get(name, [True])
    count, rank = sum(enabled), up.shape[1]
    if down.shape[0] != count * rank or up.shape[0] % count:
        reason = f"A has {down.shape[0]} rows, B {rank} columns, for {count} parts"
        raise FormatError(f"{path}: {name}", reason, "say in the header's enable_lora which parts are adapted")
    up = up * (header["lora_alpha"] / rank)
    if name in header["embedding"]:
        return LowRank("embedding", down, up)
    size = up.shape[0] // count
    starts = [place * size for place, on in enumerate(enabled) if on]
    pairs = zip(down.chunk(count), up.chunk(count), strict=True)
    parts = [((start, start + size), LowRank("linear", a, b)) for start, (a, b) in zip(starts, pairs, strict=True)]
    return block_diagonal(parts, size * len(enabled))


def _header(metadata: Mapping[str, str], modules: Iterable[str], where: str) -> dict[str, Any]:
    """What the file says beside its tensors."""
    try:
        header = {"embedding": [], "enable_lora": {}, **json.loads(metadata.get(_HEADER, "{}"))}
    except (ValueError, TypeError) as error:
        raise FormatError(where, f"its header {_HEADER} is no JSON object ({error})", _REMEDY) from error
    if set(header) != {"lora_alpha", "embedding", "enable_lora"}:
        raise FormatError(where, "lora_alpha is not in a state dict, and its header does not say it", _REMEDY)
    if unknown := {*header["embedding"], *header["enable_lora"]} - set(modules):
        name = min(unknown)
        raise FormatError(f"{where}: {name}", "the header names it, but it has no factors", nearest(name, modules))
    return header
