"""safetensors files read and written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graft.studio.disk import write_atomic
from graft.studio.errors import FormatError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes a safetensors file atomically."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_atomic(path, save(ready, dict(metadata)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises:
        FormatError: no such file, or cut off, damaged, or of another format.
    """
    if not path.is_file():
        raise FormatError(str(path), "there is no such file", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        remedy = "download or export it again; pickle files (.bin, .pt, .ckpt) are never opened"
        raise FormatError(str(path), f"not a whole safetensors file ({error})", remedy) from error
