"""ControlNet and T2I-Adapter in diffusers' folders: ``config.json`` and ``diffusion_pytorch_model.safetensors``.

The config's ``_class_name`` says which it is. What its maps are, no config says: a folder that this program wrote says
it in its header, for others it is "map", a finished map of whatever kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError
from graft.studio.formats.files import read_tensors

FILE = "diffusion_pytorch_model.safetensors"
_CONFIG = "config.json"
_METHODS = {"ControlNetModel": "controlnet", "T2IAdapter": "t2i_adapter"}
"""Class of diffusers -> method, and where the card keeps the network's config."""
_BEGINS = ("controlnet_cond_embedding.", "adapter.body.")


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return any(key.startswith(_BEGINS) for key in keys)


def read(path: Path) -> Adapter:
    """Reads a file with its config beside it.

    Raises:
        FormatError: no config, or that of another class.
    """
    beside = path.parent / _CONFIG
    try:
        config = json.loads(beside.read_text("utf-8"))
        method = _METHODS[config["_class_name"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"no config of {' or '.join(_METHODS)} stands beside {path.name}"
        raise FormatError(str(beside), reason, "give the whole folder that diffusers saved") from error
    tensors, header = read_tensors(path)
    return Adapter(tensors, Card(method, condition_of(header), "diffusion", details={method: config}))


def condition_of(header: dict[str, str]) -> dict[str, Any]:
    """What the maps are, by a file's header."""
    try:
        told = json.loads(header.get("graft.config", "{}"))
        return {"condition": str(told["condition"])}
    except (ValueError, TypeError, KeyError):
        return {"condition": "map"}
