"""Adapters in a run folder: `result/`, and `best/`, the best step so far of a training that keeps the best.

`best/` is written before the checkpoint of its step. A process that is killed between the two comes to the same step
again and finds the same score, so the file alone says what is best, and no checkpoint needs to.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from graft.studio.adapter import Adapter
from graft.studio.disk import sync_folder


def best_score(run: Path) -> float:
    """Return the score of the best step of a run so far."""
    folder = run / "best"
    return float(Adapter.load(folder).card.metrics["score"]) if folder.exists() else -math.inf


def save_adapter(final: Path, adapter: Adapter, pictures: Sequence[Path] = ()) -> None:
    """Put an adapter and pictures of it into a folder by one rename, in place of what was there."""
    draft = final.with_name(f".{final.name}-{os.getpid()}")
    for old in final.parent.glob(f".{final.name}-*"):  # left by a killed process
        shutil.rmtree(old)
    try:
        adapter.save(draft)
        for path in pictures:
            shutil.copy(path, draft / f"preview{path.suffix}")
        sync_folder(draft)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(final.parent)
