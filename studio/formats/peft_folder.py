"""The folder that peft keeps an adapter in: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError
from graft.studio.formats import provenance
from graft.studio.formats.files import write_tensors

if TYPE_CHECKING:
    from graft.studio.adapter import Card

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins every key, but those of prompts."""
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
T = TypeVar("T")


def by_component(modules: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Returns what belongs to each component of a pipeline under its name, and the rest under an empty one.

    Names lose the component: peft loads one model, so each gets a folder of its own.
    """
    components: dict[str, dict[str, T]] = {}
    for name, module in modules.items():
        first, _, rest = name.partition(".")
        component, rest = (first, rest) if first in COMPONENTS else ("", name)
        components.setdefault(component, {})[rest] = module
    return components


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: Card) -> list[Path]:
    """Writes both files, with where the adapter comes from in the header."""
    return [
        write_tensors(folder / FILE, tensors, {"format": "pt", **provenance.header(card)}),
        write_atomic(folder / CONFIG, json.dumps(config, indent=2).encode()),
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.

    Raises:
        FormatError: it is missing, or not a JSON object.
    """
    where = str(folder / CONFIG)
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(where, f"cannot be read ({error})", "export the adapter again") from error
    if not isinstance(settings, dict):
        raise FormatError(where, "not a JSON object", "export the adapter again")
    return settings


def refuse_options(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raises FormatError for options, by name, under which the tensors are not the whole story."""
    if refused := [name for name in names if config.get(name)]:
        reason = f"{config.get('peft_type', 'LORA')} with {', '.join(refused)} is more than its tensors say"
        raise FormatError(where, reason, "merge it with peft first, or convert it there to one without")
