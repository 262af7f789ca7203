"""(IA)3 in peft's folders: a vector for each module, with the module's input scaled if it is a feed-forward one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.config import from_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.formats.files import read_tensors
from graft.studio.formats.peft_folder import FILE, PREFIX, by_component, refuse_options, write_folder
from graft.studio.methods.ia3 import IA3
from graft.studio.sites import Plan, Site

_END = ".ia3_l"


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, or one for each component of a pipeline.

    Rows of a packed projection become one vector.

    Raises:
        InputError: torch's MultiheadAttention, or another site that peft has no (IA)3 for.
    """
    method = from_dict(IA3, adapter.card.config, "adapter.json")
    vectors: dict[str, Tensor] = {}
    inside = set()
    for site in Plan.from_list(adapter.card.sites):
        values, conv = adapter.tensors[f"{site.key}.l"], len(site.shape) == 4
        if len(site.shape) not in (2, 4) or site.kind == "mha":
            raise InputError(site.name, "peft has (IA)3 for linear layers and 2-d convolutions", "use native")
        if method.inside(site):
            inside.add(site.name)
            vectors[site.name] = values.view(1, -1, *[1] * (len(site.shape) - 2))
            continue
        whole = vectors.setdefault(site.name, torch.ones((1, site.shape[0], 1, 1) if conv else (site.shape[0], 1)))
        whole.view(-1)[slice(*(site.rows or (None,)))] = values
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": adapter.card.base,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "inference_mode": True,
        "task_type": None,
    }
    paths = []
    for component, parts in by_component({name: (name in inside, vector) for name, vector in vectors.items()}).items():
        names = {
            "target_modules": sorted(parts),
            "feedforward_modules": sorted(name for name, (before, _) in parts.items() if before),
        }
        tensors = {f"{PREFIX}{name}{_END}": vector for name, (_, vector) in parts.items()}
        paths += write_folder(folder / component, config | names, tensors, adapter.card)
    return paths


def read(folder: Path, settings: Mapping[str, Any]) -> Adapter:
    """Reads what peft wrote. The file tells one of a layer's widths; the other stands as 0 in the plan.

    Raises:
        FormatError: other tensors, or options under which they are not the whole story.
    """
    file = folder / FILE
    refuse_options(settings, ("fan_in_fan_out", "modules_to_save"), str(folder))
    tensors, sites, inside = {}, [], []
    for key, tensor in read_tensors(file)[0].items():
        name = key.removeprefix(PREFIX).removesuffix(_END)
        if not key.endswith(_END) or tensor.dim() not in (2, 4):
            raise FormatError(f"{file}: {key}", "not a vector of (IA)3 on a linear layer or convolution", "check it")
        before = _named(settings.get("feedforward_modules") or [], name)
        if before:
            inside.append(name)
        width = tensor.numel()
        kind, kernel = ("conv", (0, 0)) if tensor.dim() == 4 else ("linear", ())
        sites.append(Site(name, kind, ((0, width) if before else (width, 0)) + kernel))
        tensors[f"{name}.l"] = tensor.flatten().float()
    names = [re.escape(site.name) for site in sites if site.name not in inside]
    config = {"targets": names, "inputs": [re.escape(name) for name in inside]}
    return Adapter(tensors, Card("ia3", config, sites=Plan(tuple(sites)).to_list()))


def _named(patterns: str | list[str], name: str) -> bool:
    """Whether peft's setting names a module: a pattern for all of the path, or a list of its ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name.endswith(pattern) for pattern in patterns)
