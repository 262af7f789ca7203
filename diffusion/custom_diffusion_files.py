"""Files of Custom Diffusion for others: what diffusers' example script writes, plain weights, or a LoRA.

| format | files | who reads them |
|---|---|---|
| `diffusers` | `pytorch_custom_diffusion_weights.safetensors` | code with diffusers' `CustomDiffusionAttnProcessor` |
| `merged` | `custom_diffusion_unet.safetensors` | `unet.load_state_dict(..., strict=False)` |
| `lora` | `pytorch_lora_weights.safetensors` | every program that reads diffusers' LoRA |

and in each a file per word, `<new1>.safetensors` (and `<new1>_2.safetensors` for a second text encoder), for
`pipe.load_textual_inversion`. The first two are exact. A LoRA is
the best approximation of the change of its rank (singular value decomposition): `lora` keeps in each layer the largest
singular values that make up 60 % of their sum, as the authors do to save space, `lora-8` keeps eight; biases, which
`crossattn` trains, are left out. What is left out is logged and stands in the header as `residual`, || D - B A || / ||
D || over all layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.diffusion.textual_inversion import ENCODERS
from graft.diffusion.words_and_weights import change_name, parameter, whole_name
from graft.studio.adapter import Adapter
from graft.studio.errors import BaseMismatchError, InputError
from graft.studio.formats import custom_diffusion, diffusers, provenance
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.low_rank import LowRank, to_adapter
from graft.studio.sites import Plan, named_modules

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase

log = logging.getLogger("graft")
MERGED = "custom_diffusion_unet.safetensors"
SHARE = 0.6
"""Of the sum of the singular values that `lora` keeps."""


def export(adapter: Adapter, folder: Path, format: str, base: DiffusionBase | None = None) -> list[Path]:
    """Writes the files of a format.

    Args:
        adapter: of Custom Diffusion.
        folder: to write.
        format: diffusers, merged, lora or lora-RANK.
        base: its own; None loads it by its name, where it is needed.

    Raises:
        InputError: another format, or the base that the adapter names is not to be had.
    """
    rank = re.fullmatch(r"lora(?:-([1-9]\d*))?", format)
    if format not in ("diffusers", "merged") and rank is None:
        remedy = "use native, diffusers, merged, lora or lora-RANK"
        raise InputError(f"format {format!r}", "Custom Diffusion is not written in it", remedy)
    if rank is not None:
        file = _write_lora(adapter, folder, int(rank[1] or 0), base)
    else:
        weights = {name.removeprefix("unet."): weight for name, weight in whole_weights(adapter, base).items()}
        if format == "diffusers":
            file = custom_diffusion.write_weights(folder, weights, provenance.header(adapter.card))
        else:
            file = write_tensors(folder / MERGED, weights, {"format": "pt", **provenance.header(adapter.card)})
    told = provenance.header(adapter.card)
    words = [custom_diffusion.write_word(folder, token, rows, told) for token, rows in words_of(adapter).items()]
    return [file, *(path for paths in words for path in paths)]


def words_of(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Rows (n, d) of each word: `embedding`, and of a second text encoder `embedding_2`."""
    words: dict[str, dict[str, Tensor]] = {}
    for key, rows in adapter.tensors.items():
        name, _, token = key.partition(".")
        if name in ENCODERS:
            words.setdefault(token, {})[name] = rows
    return words


def whole_weights(adapter: Adapter, base: DiffusionBase | None = None) -> dict[str, Tensor]:
    """Trained weights (o, i) and biases (o,) by their names, float32.

    Args:
        adapter: of Custom Diffusion.
        base: its own; None loads it by its name, where it is needed.

    Raises:
        InputError: the base is not known.
        BaseMismatchError: another base goes by its name.
    """
    sites = Plan.from_list(adapter.card.sites)
    whole = {name: adapter.tensors.get(name) for name in map(whole_name, sites)}
    if None not in whole.values():
        return whole  # type: ignore[return-value]
    own = _base_weights(adapter, base)
    return {whole_name(site): own[whole_name(site)] + adapter.tensors[change_name(site)] for site in sites}


def changes(adapter: Adapter, base: DiffusionBase | None = None) -> dict[str, Tensor]:
    """Trained changes of what `whole_weights` gives, by the same names. Arguments and errors as there."""
    sites = Plan.from_list(adapter.card.sites)
    if all(change_name(site) in adapter.tensors for site in sites):
        return {whole_name(site): adapter.tensors[change_name(site)] for site in sites}
    own = _base_weights(adapter, base)
    return {name: adapter.tensors[name] - own[name] for name in map(whole_name, sites)}


def _base_weights(adapter: Adapter, base: DiffusionBase | None) -> Mapping[str, Tensor]:
    """The base's own of what `whole_weights` gives."""
    from graft.diffusion.base import load_base

    card = adapter.card
    if base is None and not card.base:
        raise InputError("the adapter", "its file does not name its base", "attach it to its base, and save it")
    base = base or load_base(card.base, "cpu")
    if card.base_hash and base.hash != card.base_hash:
        given = f"adapter for {card.base} with hash {card.base_hash}"
        raise BaseMismatchError(given, f"{base.name} has hash {base.hash}", "bring back the base it was trained on")
    modules: dict[str, Any] = named_modules(base.modules)
    own = {site: getattr(modules[site.name], parameter(site)) for site in Plan.from_list(card.sites)}
    return {whole_name(site): tensor.detach().float().cpu() for site, tensor in own.items()}


def _write_lora(adapter: Adapter, folder: Path, rank: int, base: DiffusionBase | None) -> Path:
    """Writes the changes as thin factors, and how much of them is lost."""
    whole = {name.removesuffix(".weight"): change for name, change in changes(adapter, base).items()}
    biases = [change for change in whole.values() if change.dim() == 1]  # which no factors hold
    factors = {name: low_rank(change, rank) for name, change in whole.items() if change.dim() == 2}
    lost = sum(float((whole[name] - part.delta).square().sum()) for name, part in factors.items())
    lost += sum(float(change.square().sum()) for change in biases)
    residual = (lost / max(1e-30, sum(float(change.square().sum()) for change in whole.values()))) ** 0.5
    ranks = [part.rank for part in factors.values()]
    [path] = diffusers.export(to_adapter(factors, "diffusion", "the adapter"), folder)
    tensors, header = read_tensors(path)
    log.warning("LoRA of ranks %d to %d: %.2f %% of the change is left out", min(ranks), max(ranks), 100 * residual)
    told = provenance.header(adapter.card)
    return write_tensors(path, tensors, {**header, **told, "residual": f"{residual:.6f}"})


def low_rank(change: Tensor, rank: int = 0) -> LowRank:
    """The best factors of a change (o, i) with a rank; 0 keeps what makes up `SHARE` of the singular values."""
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    kept = min(rank, len(s)) or 1 + int((s.cumsum(0) < SHARE * s.sum()).sum())
    root = s[:kept].sqrt()
    return LowRank("linear", (root[:, None] * v[:kept]).float(), (u[:, :kept] * root).float())
