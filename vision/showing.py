"""The studio's preview of classifiers: what pictures are taken for, by the base where it has classes, and adapted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from graft.studio.labelled.near import near
from graft.studio.shown import Asked, Shown
from graft.vision.evaluation import predict
from graft.vision.task import features

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.vision.base import VisionBase

MOST = 6
"""Classes shown for a picture."""


def shown(base: VisionBase, adapters: Sequence[Adapter], asked: Asked, out: Path) -> list[Shown]:
    """Tells what the pictures show, a column for each classifier, and which known pictures are nearest to the base.

    Raises:
        DataError: files that are no pictures.
    """
    columns: list[tuple[str, Adapter | None]] = [("base", None)] if base.classes else []
    columns += [(adapter.card.method, adapter) for adapter in adapters]
    cells = []
    for column, adapter in columns:
        for row in predict(base, adapter, asked.pictures, top=MOST):
            shares = {each["label"]: each["probability"] for each in row["top"]}
            cells.append(Shown(Path(row["picture"]).name, column, row["picture"], shares))
    return cells + near(asked, out, base.pixels, partial(features, base))
