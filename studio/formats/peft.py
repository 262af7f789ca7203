"""LoRA and DoRA in peft's folders, and which method it is that a folder holds.

The scale is multiplied into B, so alpha equals the rank in every module and a reader that ignores alpha is right too.
An adapter of several components (``unet.``, ``text_encoder.``) becomes one folder for each, since peft loads one
model.

On torch's MultiheadAttention peft always has factors for both projections, and adds those of the output projection
twice, at least up to 0.21.2: an adapter that it trained is read with twice their product, one that has them, be it
them alone, is not written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from graft.studio.adapter import Adapter
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import adalora, ia3, lokr, prompts
from graft.studio.formats.files import read_tensors
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
from graft.studio.formats.peft_folder import CONFIG, FILE, PREFIX, by_component, read_config, write_folder

_READERS = {
    "IA3": ia3.read,
    "ADALORA": adalora.read,
    "LOKR": lokr.read_folder,
    "PROMPT_TUNING": prompts.read,
    "PREFIX_TUNING": prompts.read,
}
LENGTH = ".lora_magnitude_vector"
_OUT = ".base_layer.out_proj"  # of a MultiheadAttention, in peft's keys
_TWICE = (0, 21, 2)  # the last version known to add its change twice
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


def export(adapter: Adapter, folder: Path, pipeline: bool = True) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, or one for each component.

    Args:
        adapter: of low-rank factors.
        folder: to write.
        pipeline: paths that begin with the name of a pipeline's component, such as transformer, are in that component;
            otherwise all are of one model.

    Raises:
        InputError: an output projection of torch's MultiheadAttention, or a DoRA of it.
    """
    modules = from_adapter(adapter)
    for name, module in modules.items():
        if module.kind == "mha" and not module.packed:
            raise InputError(name, "peft adds its change twice", "leave it out of the targets, or use native")
        if module.kind == "mha" and module.length is not None:
            raise InputError(name, "peft has no DoRA of torch's MultiheadAttention", "use native")
    paths, back = [], {}
    for component, parts in (by_component(modules) if pipeline else {"": modules}).items():
        target = folder / component
        paths += write_folder(target, config(parts, adapter.card.base), keys(parts), adapter.card)
        written = _read(target, read_config(target))
        back.update({f"{component}.{name}".lstrip("."): module for name, module in written.items()})
    check_written(adapter, back, str(folder))
    return paths


def read(folder: Path) -> Adapter:
    """Reads a peft folder with a LoRA, DoRA, (IA)3, AdaLoRA, a prompt or a prefix.

    Raises:
        FormatError: another method, or one that changes more than its tensors say.
    """
    settings = read_config(folder)
    if reader := _READERS.get(str(settings.get("peft_type"))):
        return reader(folder, settings)
    modules = _read(folder, settings)
    twice = _times_out(modules, settings, folder)
    return to_adapter(modules, "", str(folder), {} if twice is None else {"peft_out_proj": twice})


def _times_out(modules: dict[str, LowRank], settings: Mapping[str, Any], folder: Path) -> int | None:
    """Makes the change of each MultiheadAttention's output projection what peft made of it, and says how often it was
    added; None if there is none."""
    found = [name for name, module in modules.items() if module.kind == "mha" and not module.packed]
    if not found:
        return None
    version = str(settings.get("peft_version") or "")
    times = 1 if tuple(map(int, re.findall(r"\d+", version)[:3])) > _TWICE else 2
    for name in found:
        modules[name] = replace(modules[name], up=times * modules[name].up)
    warnings.warn(
        f"{folder}: adapts torch's MultiheadAttention, whose out_proj peft up to {'.'.join(map(str, _TWICE))} changes"
        f" twice; peft {version or 'of unknown version'} wrote it, so its change is taken {times} times",
        stacklevel=5,
    )
    return times


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


def keys(modules: Mapping[str, LowRank]) -> dict[str, Any]:
    """Returns the tensors of factors by the names that peft gives them."""
    tensors = {}
    for name, module in modules.items():
        if module.kind == "embedding":
            ends = {"lora_embedding_A": module.down, "lora_embedding_B": module.up}
        else:
            up = module.up.reshape(*module.up.shape, *[1] * (module.down.dim() - 2))
            ends = {"lora_A.weight": module.down, "lora_B.weight": up}
        if module.length is not None:
            ends["lora_magnitude_vector"] = module.length_at_output
        if module.kind == "mha":  # peft has factors for it, too: such that change nothing
            nothing = module.down.new_zeros(module.down.shape[1], module.rank)
            ends |= {f"{_OUT[1:]}.lora_A.weight": nothing.T, f"{_OUT[1:]}.lora_B.weight": nothing}
        tensors.update({f"{PREFIX}{name}.{end}": tensor for end, tensor in ends.items()})
    return tensors


def _read(folder: Path, settings: Mapping[str, Any]) -> dict[str, LowRank]:
    check_config(settings, str(folder / CONFIG))
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(folder / FILE)[0].items()}
    tables = {key: tensor for key, tensor in tensors.items() if "lora_embedding_" in key}
    lengths, others = split_lengths(tensors, LENGTH)
    layers = {key: tensor for key, tensor in others.items() if key not in tables}
    modules = {}
    for name, (down, up) in pair(tables, ".lora_embedding_A", ".lora_embedding_B", str(folder / FILE)).items():
        modules[name] = LowRank("embedding", down, up * scaling(settings, name, down.shape[0]))
    for name, (down, up) in pair(layers, ".lora_A.weight", ".lora_B.weight", str(folder / FILE)).items():
        module = low_rank(down, up, scaling(settings, name.removesuffix(_OUT), down.shape[0]))
        modules[name] = replace(module, length=lengths.get(name))
    for name in [name for name in modules if name.endswith(_OUT)]:
        attention, out = name.removesuffix(_OUT), modules.pop(name)
        if attention in modules:
            modules[attention] = replace(modules[attention], kind="mha")
        if out.up.any():
            modules[f"{attention}.out_proj"] = replace(out, kind="mha")
    check_lengths(lengths, modules, str(folder / FILE))
    return modules
