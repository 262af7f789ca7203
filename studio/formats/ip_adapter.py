"""IP-Adapter's files: ``image_proj.*`` is the projection, ``ip_adapter.{i}.to_k_ip.weight`` stands at attention i.

The names inside are those of the trained adapter too. Which kind it is, the names tell; its image encoder lies beside
it, in a folder ``image_encoder``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError
from graft.studio.formats.files import read_tensors

FILE = "ip_adapter.safetensors"
_KINDS = {"base": "image_proj.proj.weight", "plus": "image_proj.latents"}
_FOUR = 4
_OURS = re.compile(
    r"image_proj\.(proj|norm|latents|proj_in|proj_out|norm_out|layers)\b|ip_adapter\.\d+\.to_[kv]_ip\.weight$"
)


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return all(key.startswith(("image_proj.", "ip_adapter.")) for key in keys)


def read(path: Path) -> Adapter:
    """Reads a file that diffusers' ``load_ip_adapter`` loads, of kind base or plus.

    Raises:
        FormatError: another kind, such as those of faces, or one of another size than the loaders of others have.
    """
    tensors = read_tensors(path)[0]
    kind = next((kind for kind, mark in _KINDS.items() if mark in tensors), None)
    other = next((key for key in sorted(tensors) if not _OURS.match(key)), None)
    if kind is None or other is not None:
        reason = "an IP-Adapter of another kind (faces, full, FLUX)"
        raise FormatError(f"{path}: {other or 'image_proj'}", reason, "give one of the base or the plus kind")
    _check_size(tensors, kind, path)
    config: dict[str, object] = {"kind": kind}
    if kind == "plus":
        config["queries"] = tensors["image_proj.latents"].shape[1]
    beside = path.parent / "image_encoder"
    if beside.is_dir():
        config["image_encoder"] = str(beside.resolve())
    return Adapter(tensors, Card("ip_adapter", config, domain="diffusion"))


def _check_size(tensors: Mapping[str, Tensor], kind: str, path: Path) -> None:
    """Refuses what diffusers refuses, and what it loads in part: of more than four layers of a plus, the first four."""
    if kind == "plus":
        found = {int(name.split(".")[2]) for name in tensors if name.startswith("image_proj.layers.")}
        if found != set(range(_FOUR)):
            reason = f"{len(found)} resampler layers; diffusers has {_FOUR}, and leaves others out without a word"
            raise FormatError(f"{path}: image_proj.layers", reason, "give one of the published kinds")
        return
    rows, width = tensors[_KINDS[kind]].shape[0], tensors["image_proj.norm.weight"].shape[0]
    if rows != _FOUR * width:
        reason = f"{rows / width:g} tokens of a picture; diffusers, and this program, have {_FOUR}"
        raise FormatError(f"{path}: image_proj.proj.weight", reason, "give one of the published kinds")
