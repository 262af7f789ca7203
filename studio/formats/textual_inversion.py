"""A word's rows in the files of other programs.

| for | files | keys |
|---|---|---|
| diffusers | `learned_embeds.safetensors`, and `learned_embeds_2.safetensors` of a second encoder | the word: (n, d) |
| sd-scripts (kohya), A1111, ComfyUI | one, named as the word is called there | `emb_params`, or `clip_l` and `clip_g` |

In memory the rows are `embedding` of the first text encoder and `embedding_2` of the second. A file of the second kind
does not say the word; that of our own stands in the header, else it is the file's name in angle brackets.
AUTOMATIC1111's dictionaries are pickles, which are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError
from graft.studio.formats.files import read_tensors, write_tensors

FILES = {"embedding": "learned_embeds.safetensors", "embedding_2": "learned_embeds_2.safetensors"}
_ONE = {"emb_params": "embedding", "emp_params": "embedding", "clip_l": "embedding", "clip_g": "embedding_2"}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the rows of a word: keys of a word's file, or a single one that is no path of a module."""
    if set(tensors) & {"clip_l", "clip_g"}:
        return True
    return len(tensors) == 1 and all("." not in key and rows.dim() in (1, 2) for key, rows in tensors.items())


def write_apart(folder: Path, token: str, rows: Mapping[str, Tensor], header: Mapping[str, str]) -> list[Path]:
    """Writes a file for each text encoder, as diffusers' scripts do."""
    named = {FILES[name]: each.float() for name, each in rows.items()}
    return [write_tensors(folder / file, {token: each}, {"format": "pt", **header}) for file, each in named.items()]


def write_together(folder: Path, token: str, rows: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Writes one file for all text encoders, named so that ComfyUI and A1111 call it by the word's letters."""
    keys = {"embedding": "clip_l", "embedding_2": "clip_g"} if len(rows) > 1 else {"embedding": "emb_params"}
    tensors = {keys[name]: each.float() for name, each in rows.items()}
    path = folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '', token) or 'embedding'}.safetensors"
    return write_tensors(path, tensors, {"format": "pt", **header, "graft.trigger": token})


def read(path: Path) -> Adapter:
    """Reads a word's file, with the second text encoder's beside it if it is diffusers'; or a folder of these.

    Raises:
        FormatError: rows of other text encoders (T5), or files of two words.
    """
    file = path / FILES["embedding"] if path.is_dir() else path
    tensors, metadata = read_tensors(file)
    if other := set(tensors) - set(_ONE) if len(tensors) > 1 else set():
        reason = "rows of a text encoder that no word is learnt in here"
        raise FormatError(f"{file}: {min(other)}", reason, "give a word of Stable Diffusion 1, 2 or XL")
    rows = {_ONE.get(key, "embedding"): tensor for key, tensor in tensors.items()}
    (first, *_) = tensors
    token = metadata.get("graft.trigger") or (f"<{file.stem.lower()}>" if first in _ONE else first)
    beside = file.with_name(FILES["embedding_2"])
    if file.name == FILES["embedding"] and beside.is_file():
        second, _ = read_tensors(beside)
        if set(second) != set(tensors):
            given = f"{file.name} of {', '.join(tensors)}, {beside.name} of {', '.join(second)}"
            raise FormatError(str(file.parent), f"two files of one word are expected ({given})", "put them apart")
        rows["embedding_2"] = second[first]
    for name, tensor in rows.items():
        if tensor.dim() not in (1, 2) or not tensor.numel():
            raise FormatError(
                f"{file}: {name}", f"rows (n, d) are expected, not {tuple(tensor.shape)}", "save it again"
            )
    rows = {name: tensor.float().reshape(-1, tensor.shape[-1]) for name, tensor in rows.items()}
    counts = {len(tensor) for tensor in rows.values()}
    if len(counts) > 1:
        raise FormatError(str(file), "its text encoders have other numbers of rows", "train the word again")
    card = Card("textual_inversion", {"token": token, "vectors": counts.pop()}, "diffusion", trigger=token)
    return Adapter(rows, card)
