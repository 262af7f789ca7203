"""LoRA and DoRA in diffusers' file: ``pytorch_lora_weights.safetensors``, ``<component>.<module>.lora_A.weight``.

diffusers keeps alpha in the header only, where other programs lose it; so the scale is multiplied into B, alpha
equals the rank, and the header is written as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.studio.adapter import Adapter
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import peft, provenance
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
from graft.studio.formats.peft_folder import COMPONENTS

FILE = "pytorch_lora_weights.safetensors"
_HEADER = "lora_adapter_metadata"

# Spellings of earlier diffusers versions, to the present one, in this order.
_EARLIER = (
    (r"\.processor\.", "."),
    (r"^(text_encoder.*)\.to_(q|k|v|out)_lora\.(down|up)\.weight$", r"\1.\2_proj.lora.\3.weight"),
    (r"\.to_(q|k|v)_lora\.(down|up)\.weight$", r".to_\1.lora.\2.weight"),
    (r"\.to_out_lora\.(down|up)\.weight$", r".to_out.0.lora.\1.weight"),
    (r"\.(?:lora|lora_linear_layer)\.down\.weight$", ".lora_A.weight"),
    (r"\.lora_magnitude_vector\.weight$", peft.LENGTH),
    (r"\.(?:lora|lora_linear_layer)\.up\.weight$", ".lora_B.weight"),
)


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a file that ``pipe.load_lora_weights(folder)`` loads.

    Raises:
        InputError: sites outside a pipeline's components, or embeddings, which diffusers does not load.
    """
    modules = from_adapter(adapter)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    components: dict[str, dict[str, LowRank]] = {}
    for name, module in modules.items():
        component, _, rest = name.partition(".")
        if component not in COMPONENTS:
            raise InputError(name, "names no component of a pipeline", "attach to {'unet': unet} or export to peft")
        if module.kind == "embedding":
            raise InputError(name, "diffusers loads no LoRA of an embedding", "export to peft")
        components.setdefault(component, {})[rest] = module
        up = module.up.reshape(*module.up.shape, *[1] * (module.down.dim() - 2))
        tensors |= {f"{name}.lora_A.weight": module.down, f"{name}.lora_B.weight": up}
        if module.length is not None:
            # transformers, which loads those of text encoders, wants every key to end like this.
            end = ".weight" if component.startswith("text_encoder") else ""
            tensors[f"{name}{peft.LENGTH}{end}"] = module.length_at_output
    for component, parts in components.items():
        header |= {f"{component}.{key}": value for key, value in peft.config(parts, adapter.card.base).items()}
    metadata = {"format": "pt", _HEADER: json.dumps(header, sort_keys=True), **provenance.header(adapter.card)}
    path = write_tensors(folder / FILE, tensors, metadata)
    check_written(adapter, _read(path), str(path))
    return [path]


def read(path: Path) -> Adapter:
    """Reads a diffusers LoRA file of this or an earlier spelling.

    Raises:
        FormatError: keys of another program, or factors without a partner.
    """
    return to_adapter(_read(path), "diffusion", str(path))


def _read(path: Path) -> dict[str, LowRank]:
    tensors, metadata = read_tensors(path)
    foreign = next((key for key in tensors if key.partition(".")[0] not in COMPONENTS), None)
    if foreign is not None:
        expected = f"expected {', '.join(COMPONENTS)}"
        raise FormatError(f"{path}: {foreign}", "does not begin with a component", expected)
    configs = _configs(metadata, str(path))
    modules = {}
    lengths, factors = split_lengths(_renamed(tensors), peft.LENGTH)
    for name, (down, up) in pair(factors, ".lora_A.weight", ".lora_B.weight", str(path)).items():
        component, _, rest = name.partition(".")
        config = configs.get(component)
        scaling = 1.0 if config is None else peft.scaling(config, rest, down.shape[0])
        modules[name] = replace(low_rank(down, up, scaling), length=lengths.get(name))
    check_lengths(lengths, modules, str(path))
    return modules


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """The header's peft config of each component; without a header alpha equals the rank."""
    try:
        header = json.loads(metadata.get(_HEADER, "{}"))
    except ValueError as error:
        raise FormatError(where, f"its header {_HEADER} is not JSON ({error})", "export it again") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    for config in configs.values():
        peft.check_config(config, where)
    return configs


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, to in _EARLIER:
            key = re.sub(pattern, to, key)
        renamed[key] = tensor
    return renamed
