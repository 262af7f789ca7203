"""safetensors files read and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Ends of files that are never opened: reading a pickle can run any program."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes a safetensors file atomically; the same tensors and metadata give the same bytes."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_atomic(path, _in_order(save(ready, dict(metadata))))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata in the order of their names: the library's own order is drawn anew each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if len(header.get("__metadata__", {})) < 2:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[8 + size :]])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises:
        FormatError: no such file, or cut off, damaged, or of another format, such as a pickle.
    """
    if not path.is_file():
        raise FormatError(str(path), "there is no such file", "check the path")
    if path.suffix in PICKLES:
        reason = "a pickle, which can run any program when it is opened, and never is here"
        remedy = (
            "If you trust it, read it by torch.load with weights_only=True, and write it by safetensors.torch.save_file"
        )
        raise FormatError(str(path), reason, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        remedy = f"download or export it again; pickle files ({', '.join(PICKLES)}) are never opened"
        raise FormatError(str(path), f"not a whole safetensors file ({error})", remedy) from error
