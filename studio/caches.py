"""Content-addressed store for all that is computed once from frozen things: decoded pixels, latents, text embeddings.

An entry's key is the SHA-256 of everything its value depends on (picture bytes, transform, encoder weights, caption),
so an entry is never stale and never belongs to another picture: an edited caption or another VAE is simply another key.
Entries are safetensors files written by temp + fsync + rename; a checksum in the header finds damaged ones, which are
built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from graft.studio.errors import FormatError
from graft.studio.formats.files import read_tensors, write_tensors

log = logging.getLogger(__name__)


def content_key(*parts: object) -> str:
    """SHA-256 of JSON-able parts, in hex: the name of a cache entry."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def default_root() -> Path:
    """`$GRAFT_CACHE`, else `~/.cache/graft`."""
    return Path(os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft")


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Cache:
    """Named tensors by content key, as files.

    Args:
        root: folder of the entries; made on first write. Several processes may share it.

    `counts` holds hits, misses and rebuilt (damaged) entries per kind, e.g. `counts["latents", "hit"]`.

    Example:
        >>> import tempfile, torch
        >>> cache = Cache(Path(tempfile.mkdtemp()))
        >>> cache.get("latents", content_key("picture", "vae"), lambda: {"mean": torch.zeros(4)})["mean"].shape
        torch.Size([4])
        >>> str(cache)
        'latents 0 hits, 1 miss'
    """

    def __init__(self, root: Path | str | None = None):
        self.root = Path(root) if root is not None else default_root()
        self.counts: Counter[tuple[str, str]] = Counter()

    def path(self, kind: str, key: str) -> Path:
        """File of an entry."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def get(self, kind: str, key: str, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry's tensors on the CPU, from the file or from `build`.

        Args:
            kind: sub-folder and heading of the counts: "pixels", "latents", "text", "class".
            key: from `content_key`.
            build: makes the tensors when the entry is absent or damaged.

        Raises:
            DiskFullError: the disk has no room for a new entry.
        """
        found = self.peek(kind, key)
        if found is not None:
            self.counts[kind, "hit"] += 1
            return found
        self.counts[kind, "miss"] += 1
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in build().items()}
        try:
            write_tensors(self.path(kind, key), tensors, {"checksum": _checksum(tensors)})
        except OSError as error:  # a read-only home is no reason not to train
            log.warning("nothing is cached: %s cannot be written (%s)", self.root, error)
        return tensors

    def peek(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors, or None when it is absent or damaged."""
        path = self.path(kind, key)
        if not path.exists():
            return None
        try:
            tensors, header = read_tensors(path)
        except FormatError:
            tensors, header = {}, {}
        if header.get("checksum") != _checksum(tensors):
            self.counts[kind, "rebuilt"] += 1
            return None
        return tensors

    def __str__(self) -> str:
        lines = []
        for kind in sorted({kind for kind, _ in self.counts}):
            hits, misses = self.counts[kind, "hit"], self.counts[kind, "miss"]
            rebuilt = self.counts[kind, "rebuilt"]
            text = f"{kind} {hits} hit{'s' * (hits != 1)}, {misses} miss{'es' * (misses != 1)}"
            lines.append(text + (f", {rebuilt} damaged and rebuilt" if rebuilt else ""))
        return "; ".join(lines) or "nothing cached"
