"""AdaLoRA in peft's folders: ``<module>.lora_A``, ``.lora_B`` and ``.lora_E``, and one rank for all modules.

peft scales by alpha / (rank + 1e-5). Our scale goes into the factors such that alpha equals the rank, and modules of a
smaller rank are filled with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError, InputError
from graft.studio.formats.files import read_tensors
from graft.studio.formats.low_rank import LowRank, by_module, check_written, from_adapter
from graft.studio.formats.peft_folder import FILE, PREFIX, by_component, read_config, refuse_options, write_folder
from graft.studio.methods.adalora import AdaLoRA
from graft.studio.sites import Plan, Site, nearest

_ENDS = ("lora_A", "lora_B", "lora_E")
_SMALL = 1e-5


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, or one for each component of a pipeline.

    Raises:
        InputError: torch's MultiheadAttention, for which peft has no AdaLoRA.
    """
    modules = from_adapter(adapter)
    if attention := [name for name, module in modules.items() if module.kind == "mha"]:
        raise InputError(attention[0], "peft has no AdaLoRA of torch's MultiheadAttention", "use native")
    values = {
        name: torch.cat([adapter.tensors[f"{site.key}.E"] for site, _ in parts])
        for name, parts in by_module(adapter).items()
    }
    paths, back = [], {}
    for component, parts in by_component({name: (module, values[name]) for name, module in modules.items()}).items():
        target = folder / component
        paths += _write(target, parts, adapter.card)
        for name, (a, b, e) in _read(target, read_config(target)).items():
            back[f"{component}.{name}".lstrip(".")] = LowRank("linear", a, b * e)
    check_written(AdaLoRA.as_lora(adapter), back, str(folder))
    return paths


def _write(folder: Path, modules: Mapping[str, tuple[LowRank, Tensor]], card: Card) -> list[Path]:
    """Writes the folder of one model from the factors and E of its modules."""
    rank = max(module.rank for module, _ in modules.values())
    tensors = {}
    for name, (module, values) in modules.items():
        padded = module.padded(rank)
        values = F.pad(values * ((rank + _SMALL) / rank), (0, rank - len(values)))[:, None]
        for end, tensor in zip(_ENDS, (padded.down, padded.up, values), strict=True):
            tensors[f"{PREFIX}{name}.{end}"] = tensor
    config = {
        "peft_type": "ADALORA",
        "base_model_name_or_path": card.base,
        "init_r": rank,
        "target_r": min(rank, int(card.config.get("target_rank", rank))),
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "total_step": 1,
        "inference_mode": True,
        "task_type": None,
    }
    return write_folder(folder, config, tensors, card)


def read(folder: Path, settings: Mapping[str, Any]) -> Adapter:
    """Reads what peft wrote, with scale 1; ranks may differ between modules.

    Raises:
        FormatError: other tensors, or options under which they are not the whole story.
    """
    found = _read(folder, settings)
    rank = max(1, *(len(values) for _, _, values in found.values()))
    tensors: dict[str, Tensor] = {}
    sites = []
    for name, (down, up, values) in found.items():
        tensors |= {f"{name}.A": down, f"{name}.B": up, f"{name}.E": values}
        sites.append(Site(name, "linear", (up.shape[0], down.shape[1])))
    target = max(1, min(rank, int(settings.get("target_r") or rank)))
    config = {"rank": rank, "alpha": float(rank), "target_rank": target, "targets": list(found)}
    return Adapter(tensors, Card("adalora", config, sites=Plan(tuple(sites)).to_list()))


def _read(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, B and E of each module, with peft's scale in E."""
    refuse_options(settings, ("fan_in_fan_out", "modules_to_save", "trainable_token_indices"), str(folder))
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(folder / FILE)[0].items()}
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    wanted = {f"{name}.{end}" for name in names for end in _ENDS}
    if not tensors or wanted != set(tensors):
        key = min(wanted ^ set(tensors), default="no key")
        raise FormatError(f"{folder / FILE}: {key}", "missing, or no factor of AdaLoRA", nearest(key, wanted))
    rank, alpha = settings.get("init_r", 12), settings.get("lora_alpha", 8)
    scale = (alpha if alpha > 0 else rank) / (rank + _SMALL)
    triples = {}
    for name in names:
        down, up, values = (tensors[f"{name}.{end}"].float() for end in _ENDS)
        triples[name] = (down, up, values.flatten() * scale)
    return triples
