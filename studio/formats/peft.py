"""LoRA, DoRA and (IA)3 in peft's folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

The scale is multiplied into B, so alpha equals the rank in every module and a reader that ignores alpha is right too.
An adapter of several components (``unet.``, ``text_encoder.``) becomes one folder for each, since peft loads one
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from graft.studio.adapter import Adapter
from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError
from graft.studio.formats import ia3
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.low_rank import LowRank, check_written, from_adapter, low_rank, pair, to_adapter

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")

_PREFIX = "base_model.model."
# Options under which the two factors are not the whole story.
_REFUSED = (
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, or one for each component."""
    modules = from_adapter(adapter)
    components: dict[str, dict[str, LowRank]] = {}
    for name, module in modules.items():
        first, _, rest = name.partition(".")
        component, rest = (first, rest) if first in COMPONENTS else ("", name)
        components.setdefault(component, {})[rest] = module
    paths, back = [], {}
    for component, parts in components.items():
        target = folder / component
        paths += [
            write_tensors(target / FILE, _keys(parts), {"format": "pt"}),
            write_atomic(target / CONFIG, json.dumps(config(parts, adapter.card.base), indent=2).encode()),
        ]
        back.update({f"{component}.{name}".lstrip("."): module for name, module in _read(target).items()})
    check_written(adapter, back, str(folder))
    return paths


def read(folder: Path) -> Adapter:
    """Reads a peft folder with a LoRA, a DoRA or an (IA)3.

    Raises:
        FormatError: another method, or one that changes more than its tensors say.
    """
    settings = _settings(folder)
    if settings.get("peft_type") == "IA3":
        return ia3.read(folder / FILE, settings)
    return to_adapter(_read(folder), "", str(folder))


def config(modules: Mapping[str, LowRank], base: str) -> dict[str, Any]:
    """Returns peft's config for factors with alpha equal to the rank."""
    ranks = {name: module.rank for name, module in modules.items()}
    rank = max(ranks.values())
    others = {re.escape(name): other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(module.length is not None for module in modules.values()),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns the scale of a module by peft's rules: alpha (by pattern) over the rank or its root."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha", 8)
    )
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises FormatError for options that a pair of factors does not express."""
    refused = [name for name in _REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
        refused.append(f"init_lora_weights={config['init_lora_weights']}")  # such bases were changed, too
    if refused or config.get("peft_type", "LORA") != "LORA":
        reason = f"not a plain LoRA ({', '.join(refused) or config['peft_type']})"
        raise FormatError(where, reason, "convert it with peft to a plain LoRA first")


def _keys(modules: Mapping[str, LowRank]) -> dict[str, Any]:
    tensors = {}
    for name, module in modules.items():
        if module.kind == "embedding":
            ends = {"lora_embedding_A": module.down, "lora_embedding_B": module.up}
        else:
            up = module.up.reshape(*module.up.shape, *[1] * (module.down.dim() - 2))
            ends = {"lora_A.weight": module.down, "lora_B.weight": up}
        if module.length is not None:
            ends["lora_magnitude_vector"] = module.length.view(
                *([1, -1] if module.down.dim() > 2 else [-1]), *[1] * (module.down.dim() - 2)
            )
        tensors.update({f"{_PREFIX}{name}.{end}": tensor for end, tensor in ends.items()})
    return tensors


def _settings(folder: Path) -> dict[str, Any]:
    where = str(folder / CONFIG)
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(where, f"cannot be read ({error})", "export the adapter again") from error
    if not isinstance(settings, dict):
        raise FormatError(where, "not a JSON object", "export the adapter again")
    return settings


def _read(folder: Path) -> dict[str, LowRank]:
    settings = _settings(folder)
    check_config(settings, str(folder / CONFIG))
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in read_tensors(folder / FILE)[0].items()}
    tables = {key: tensor for key, tensor in tensors.items() if "lora_embedding_" in key}
    end = ".lora_magnitude_vector"
    lengths = {key.removesuffix(end): t.flatten() for key, t in tensors.items() if key.endswith(end)}
    layers = {key: t for key, t in tensors.items() if key not in tables and not key.endswith(end)}
    modules = {}
    for name, (down, up) in pair(tables, ".lora_embedding_A", ".lora_embedding_B", str(folder / FILE)).items():
        modules[name] = LowRank("embedding", down, up * scaling(settings, name, down.shape[0]))
    for name, (down, up) in pair(layers, ".lora_A.weight", ".lora_B.weight", str(folder / FILE)).items():
        module = low_rank(down, up, scaling(settings, name, down.shape[0]))
        modules[name] = replace(module, length=lengths.get(name))
    if lengths and set(lengths) != set(modules):
        (name, *_) = set(lengths) ^ set(modules)
        raise FormatError(
            f"{folder / FILE}: {name}", "a DoRA in which lengths or factors are missing", "export it again"
        )
    return modules
