"""Custom Diffusion in the files of diffusers' example script: ``pytorch_custom_diffusion_weights.safetensors`` with
whole weights ``<layer>.attn2.processor.to_k_custom_diffusion.weight``, ``<new1>.safetensors`` with the row of a word.
With ``freeze_model=crossattn`` also ``to_q_custom_diffusion.weight`` and ``to_out_custom_diffusion.0.weight`` and
``.bias``.

diffusers writes them and, up to 0.42, does not read them back: `unet.load_attn_procs` ends without an error and without
a change. Some of its versions name a word's file ``<new1>.bin`` though it is a safetensors file, which is read; pickles
are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.sites import Plan, Site

FILE = "pytorch_custom_diffusion_weights.safetensors"
_NAME = re.compile(r"(.+)\.(to_[qkv]|to_out)(\.0)?\.(weight|bias)")
_KEY = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_custom_diffusion(\.0)?\.(weight|bias)")
_WORDS = {"embedding": "", "embedding_2": "_2"}
"""Rows of a word -> how the name of their file ends."""


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return any("_custom_diffusion." in key for key in keys)


def write_weights(folder: Path, weights: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Writes whole parameters, by their names in the UNet such as ``...attn2.to_k.weight``."""
    named = {_NAME.sub(r"\1.processor.\2_custom_diffusion\3.\4", name): weight for name, weight in weights.items()}
    return write_tensors(folder / FILE, named, {"format": "pt", **header})


def write_word(folder: Path, token: str, rows: Mapping[str, Tensor], header: Mapping[str, str]) -> list[Path]:
    """Writes the rows (n, d) of a word for ``pipe.load_textual_inversion``, a file for each text encoder; one row
    without its n."""
    paths = []
    for name, each in rows.items():
        path = folder / f"{token.replace('/', '_')}{_WORDS[name]}.safetensors"
        values = each.float()
        told = {"format": "pt", **header}
        paths.append(write_tensors(path, {token: values[0] if len(values) == 1 else values}, told))
    return paths


def read(path: Path) -> Adapter:
    """Reads a folder of the script, or its file of weights with the words' files beside it.

    Raises:
        FormatError: keys of something else, no word, or a word in a pickle.
    """
    file = path / FILE if path.is_dir() else path
    tensors, sites = {}, []
    for key, weight in read_tensors(file)[0].items():
        told = _KEY.fullmatch(key)
        if told is None:
            raise FormatError(
                f"{file}: {key}", "the script writes no such key", "convert the file with its own program"
            )
        layer, last, parameter = told[1], f"{told[2]}{told[3] or ''}", told[4]
        role = "o" if last.startswith("to_out") else last[-1]
        kind = "bias" if parameter == "bias" else "linear"
        sites.append(Site(f"unet.{layer}.{last}", kind, tuple(weight.shape), None, "unet", role))
        tensors[f"unet.{layer}.{last}.{parameter}"] = weight.float()
    found = [word for other in sorted(file.parent.iterdir()) if (word := _word(other)) is not None]
    if not found:
        raise FormatError(str(file), "no file of a word stands beside it", "put <new1>.safetensors into its folder")
    tensors |= {f"{name}.{token}": rows for name, token, rows in found}
    words = list(dict.fromkeys(token for _, token, _ in found))
    config: dict[str, Any] = {"token": words if len(words) > 1 else words[0]}
    if any(site.role == "q" for site in sites):
        config["freeze_model"] = "crossattn"
    plan = Plan(tuple(sites)).to_list()
    card = Card("custom_diffusion", config, "diffusion", sites=plan, trigger=" and ".join(words))
    return Adapter(tensors, card)


def _word(path: Path) -> tuple[str, str, Tensor] | None:
    """Which rows, their word, and themselves (n, d), of a file that is named like a word; None for other files."""
    if not path.name.startswith("<") or path.suffix not in (".safetensors", ".bin"):
        return None
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        reason = "a pickle, which can run any program when it is opened, or damaged"
        raise FormatError(str(path), reason, "save the word again as safetensors") from error
    if len(tensors) != 1 or (rows := next(iter(tensors.values()))).dim() not in (1, 2):
        raise FormatError(str(path), "it does not hold the rows of one word", "save the word again")
    (token,) = tensors
    second = path.stem.endswith("_2") and not token.endswith("_2")
    return "embedding_2" if second else "embedding", token, rows.float().reshape(-1, rows.shape[-1])
