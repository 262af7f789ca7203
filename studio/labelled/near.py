"""For the studio's preview of classifiers: of the pictures that an adapter was taught, those most like others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from graft.studio.labelled.drawings import TILE
from graft.studio.labelled.figures import nearest
from graft.studio.pictures import BROKEN, checked_bytes, open_picture
from graft.studio.shown import Asked, Shown

COUNT = 3
"""Pictures shown beside one that is asked about."""
MOST = 200
"""Known pictures that are compared, evenly spread over all."""
MEGAPIXELS, BATCH = 120.0, 32


def near(
    asked: Asked, out: Path, read: Callable[[Image.Image], Tensor], encode: Callable[[Tensor], Tensor]
) -> list[Shown]:
    """Returns a cell for each picture with the known ones nearest to it by cosine; none if none are known.

    Args:
        asked: pictures, and known ones in folders by class.
        out: folder for what is drawn.
        read: a picture as the model takes it, (3, h, w).
        encode: features of such pictures, (n, 3, h, w) to (n, d).
    """
    spread = torch.linspace(0, len(asked.known) - 1, min(MOST, len(asked.known))).long().tolist()
    opened = [(Path(asked.known[k]).parent.name, _opened(asked.known[k])) for k in spread]
    known = [(name, picture) for name, picture in opened if picture is not None]
    if not known:
        return []
    files = [Path(picture) for picture in asked.pictures]
    asked_for = [open_picture(checked_bytes(file, MEGAPIXELS)) for file in files]

    def features(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([read(picture) for picture in pictures])
        return torch.cat([encode(part) for part in pixels.split(BATCH)])

    with torch.no_grad():
        places, likeness = nearest(features(asked_for), features([picture for _, picture in known]), COUNT)
    cells = []
    for k, file in enumerate(files):
        rows, cosines = places[k].tolist(), likeness[k].tolist()
        told = ", ".join(f"{known[row][0]} {cosine:.2f}" for row, cosine in zip(rows, cosines, strict=True))
        strip = _strip([known[row][1] for row in rows], out / f"near-{k}.png")
        cells.append(Shown(file.name, "nearest known", str(strip), text=told))
    return cells


def _opened(file: str) -> Image.Image | None:
    """A picture; None if it is no longer there or sound."""
    try:
        return open_picture(checked_bytes(Path(file), MEGAPIXELS))
    except BROKEN:
        return None


def _strip(pictures: Sequence[Image.Image], path: Path) -> Path:
    """Squares side by side."""
    strip = Image.new("RGB", (TILE * len(pictures), TILE), "white")
    for k, picture in enumerate(pictures):
        edge = min(picture.size)
        left, top = ((length - edge) // 2 for length in picture.size)
        square = picture.resize((TILE, TILE), box=(left, top, left + edge, top + edge))
        strip.paste(square, (TILE * k, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)
    return path
