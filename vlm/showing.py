"""The studio's preview of CLIP classifiers: what each picture is taken for, by zero-shot and by each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graft.studio.labelled.near import near
from graft.studio.shown import Asked, Shown
from graft.vlm.head import Setting
from graft.vlm.pictures import to_pixels
from graft.vlm.previews import answer, read_pixels

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.vlm.base import ClipBase

MOST = 6
"""Classes shown for a picture."""


def shown(base: ClipBase, adapters: Sequence[Adapter], asked: Asked, out: Path) -> list[Shown]:
    """Tells what the pictures show: zero-shot with the first adapter's classes, each adapter, and the nearest known.

    Raises:
        InputError: files that are no pictures.
    """
    pixels = torch.stack([read_pixels(Path(picture), base) for picture in asked.pictures])
    details = adapters[0].card.details
    setting = Setting(base, tuple(details["classes"]), tuple(details["templates"]))
    with torch.no_grad():
        zero_shot = setting.zero_shot(base.encode_image(pixels).float()).softmax(-1).cpu()
    columns = [("base", setting.names, zero_shot)]
    for adapter in adapters:
        with adapter.attached(base) as classifier:
            told = classifier.logits_of_pixels(pixels).softmax(-1)
        columns.append((adapter.card.method, tuple(adapter.card.details["classes"]), told))
    cells = [
        Shown(Path(picture).name, column, picture, answer(names, row, MOST))
        for column, names, rows in columns
        for picture, row in zip(asked.pictures, rows, strict=True)
    ]
    return cells + near(asked, out, lambda picture: to_pixels(picture, base.preprocess), base.encode_image)
