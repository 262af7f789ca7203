"""safetensors files read and written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graft.studio.errors import DiskFullError, FormatError


def write_atomic(path: Path, data: bytes) -> Path:
    """Writes a file by a temporary one beside it, fsync and rename: a reader sees the old file or the new one.

    Raises:
        DiskFullError: no space; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes files for the owner only
        Path(name).replace(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                str(path), f"no space for {len(data):,} bytes", "free some space, then repeat"
            ) from error
        raise
    return path


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
