"""The feature store: what the frozen image tower says of every view of every picture, computed once, read by mapping.

A store is a folder per image tower and preprocessing, of packs: safetensors files with a matrix of features and, in the
header, whose rows they are (picture digest and view). Packs are written whole or not at all, and never changed, so any
number of processes may read and write; rows that are missing become a new pack. An edited picture, other weights or
another crop are simply other rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graft.studio.caches import content_key, default_root
from graft.studio.formats.files import write_tensors
from graft.vlm.base import ClipBase
from graft.vlm.data import DataConfig, Example
from graft.vlm.pictures import load_view

log = logging.getLogger("graft")
_BATCH = 64


class FeatureStore:
    """Features before the projection, by picture and view.

    Args:
        root: None is the cache folder.

    `computed` counts views that went through the image tower.

    Example:
        >>> features = FeatureStore().get(base, split.train, config, views=[0, 1])  # doctest: +SKIP
    """

    def __init__(self, root: Path | None = None):
        self.root = root or default_root() / "features"
        self.computed = 0

    def get(self, base: ClipBase, examples: Sequence[Example], config: DataConfig, views: Sequence[int]) -> Tensor:
        """Features of some views: (n, v, p) float32, on the CPU."""
        folder = self.root / content_key("features-1", base.image_hash)[:32]
        names = [_row(example, view, config) for example in examples for view in views]
        if any(hasattr(module, "graft_slots") for module in base.vision.modules()):
            raise ValueError("the image tower carries an adapter: its features are not the base's")
        known = self._read(folder, set(names))
        missing = [k for k, name in enumerate(names) if name not in known]
        if missing:
            unique = {names[k]: (examples[k // len(views)], views[k % len(views)]) for k in missing}
            made = self._compute(base, list(unique.values()), config)
            self.computed += len(unique)
            self._write(folder, list(unique), made)
            known |= dict(zip(unique, made, strict=True))
        width = next(iter(known.values())).shape[0] if known else 0
        return torch.stack([known[name] for name in names]).view(len(examples), len(views), width)

    def _read(self, folder: Path, wanted: set[str]) -> dict[str, Tensor]:
        """Rows that are there. A pack is mapped, and only the rows asked for are touched; a damaged one is ignored."""
        found: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    rows = json.loads((file.metadata() or {}).get("rows", "[]"))
                    if wanted.isdisjoint(rows):
                        continue
                    features = file.get_tensor("features")
            except (SafetensorError, OSError, ValueError):
                log.warning("%s is damaged and will be computed again", path)
                continue
            found |= {name: features[k] for k, name in enumerate(rows) if name in wanted}
        return found

    def _write(self, folder: Path, rows: list[str], features: Tensor) -> None:
        try:
            write_tensors(folder / f"{content_key(rows)[:32]}.safetensors", {"features": features}, {
                "rows": json.dumps(rows)
            })  # fmt: skip
        except OSError as error:  # a read-only home is no reason not to train
            log.warning("nothing is kept: %s cannot be written (%s)", folder, error)

    @torch.no_grad()
    def _compute(self, base: ClipBase, wanted: list[tuple[Example, int]], config: DataConfig) -> Tensor:
        parts = []
        for start in range(0, len(wanted), _BATCH):
            views = [load_view(example, view, base.preprocess, config) for example, view in wanted[start:][:_BATCH]]
            pixels = base.preprocess.normalise(torch.stack(views).to(base.device))
            parts.append(base.pool(pixels).float().cpu())
        return torch.cat(parts)


def _row(example: Example, view: int, config: DataConfig) -> str:
    """Name of a row: everything but the model that its features depend on."""
    shape = f"{config.crop}:{int(config.flip)}:" if view else ""
    return f"{example.digest}:{view}:{shape}{config.background}"
