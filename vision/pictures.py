"""Pictures of results: what was taken for what, which classes are confused, whether probabilities can be trusted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from graft.studio.disk import write_atomic

_RIGHT, _WRONG, _INK, _RULE = (40, 140, 80), (200, 50, 45), (30, 30, 30), (215, 215, 215)
TILE = 96
"""Side of a picture on a sheet."""


def _save(path: Path, picture: Image.Image) -> Path:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return write_atomic(path, data.getvalue())


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def sheet(
    path: Path, pixels: Tensor, probabilities: Tensor, labels: Tensor | None, classes: Sequence[str], columns: int = 8
) -> Path:
    """Draws pictures with what they were taken for and how surely; a wrong one names the right class too.

    Args:
        path: of the PNG file.
        pixels: (n, 3, h, w) uint8.
        probabilities: (n, c).
        labels: (n,) or None where the right class is not known.
        classes: names.
        columns: pictures in a row.
    """
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    line, gap = 14, 6
    height = TILE + 2 * line + gap
    page = Image.new("RGB", (columns * (TILE + gap) + gap, rows * height + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for k, (picture, told) in enumerate(zip(pixels, probabilities, strict=True)):
        left, top = gap + k % columns * (TILE + gap), gap + k // columns * height
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
        page.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST if tile.width < TILE else None), (left, top))
        best = int(told.argmax())
        right = labels is None or best == int(labels[k])
        pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline=_RIGHT if right else _WRONG, width=2)
        text = f"{_short(classes[best], 12)} {100 * float(told[best]):.0f}%"
        pen.text((left, top + TILE), text, _INK if right else _WRONG, font)
        if not right and labels is not None:
            pen.text((left, top + TILE + line), f"is {_short(classes[int(labels[k])], 13)}", _INK, font)
    return _save(path, page)


def confusion_picture(path: Path, counts: np.ndarray, classes: Sequence[str]) -> Path:
    """Draws a confusion matrix, rows as shares of the true class; names and numbers where there is room.

    Args:
        path: of the PNG file.
        counts: (c, c): how often row was taken for column.
        classes: names.
    """
    many = len(classes)
    cell = max(6, min(40, 720 // many))
    named = cell >= 12
    margin = 110 if named else 24
    side = margin + many * cell + 8
    page = Image.new("RGB", (side, side + 18), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i in range(many):
        for j in range(many):
            box = (margin + j * cell, margin + i * cell, margin + (j + 1) * cell - 1, margin + (i + 1) * cell - 1)
            strength, colour = float(shares[i, j]), _RIGHT if i == j else _WRONG
            pen.rectangle(box, tuple(round(255 + strength**0.6 * (c - 255)) for c in colour), _RULE)
            if cell >= 26 and counts[i, j]:
                pen.text((box[0] + cell / 2, box[1] + cell / 2), str(int(counts[i, j])), _INK, font, anchor="mm")
        if named:
            pen.text((margin - 4, margin + (i + 0.5) * cell), _short(classes[i], 17), _INK, font, anchor="rm")
            _upright(page, (margin + round((i + 0.5) * cell), margin - 4), _short(classes[i], 17), font)
    pen.text((margin, side), "row: what it is; column: what it was taken for", _INK, font)
    return _save(path, page)


def _upright(page: Image.Image, foot: tuple[int, int], text: str, font: Any) -> None:
    """Writes text from a foot upwards."""
    width, height = (round(v) for v in font.getbbox(text)[2:])
    label = Image.new("RGB", (width + 2, height + 2), "white")
    ImageDraw.Draw(label).text((0, 0), text, _INK, font)
    page.paste(label.rotate(90, expand=True), (foot[0] - height // 2 - 1, foot[1] - width - 2))


def reliability_picture(path: Path, bins: Sequence[tuple[float, float, int]], error: float) -> Path:
    """Draws how often the model is right against how sure it says it is.

    Args:
        path: of the PNG file.
        bins: (mean confidence, accuracy, pictures), as `calibration` gives them.
        error: expected calibration error.
    """
    side, margin = 300, 44
    page = Image.new("RGB", (side + margin + 12, side + margin + 30), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    at = lambda x, y: (margin + x * side, 22 + (1 - y) * side)  # noqa: E731
    for k in range(6):
        pen.line([at(0, k / 5), at(1, k / 5)], _RULE)
        pen.text((margin - 4, at(0, k / 5)[1]), f"{k / 5:.1f}", _INK, font, anchor="rm")
        pen.text((at(k / 5, 0)[0], at(0, 0)[1] + 4), f"{k / 5:.1f}", _INK, font, anchor="ma")
    total = max(1, sum(count for *_, count in bins))
    for confidence, accuracy, count in bins:
        half = 0.03
        pen.rectangle([at(confidence - half, accuracy), at(confidence + half, 0)], (185, 205, 235))
        pen.text((at(confidence, accuracy)[0], at(0, accuracy)[1] - 2), f"{100 * count / total:.0f}%", _INK, font,
                 anchor="ms")  # fmt: skip
    pen.line([at(0, 0), at(1, 1)], _WRONG)
    pen.text((margin, 4), f"share that is right by confidence; calibration error {error:.3f}", _INK, font)
    pen.text((margin + side / 2, side + margin + 8), "confidence; bars: share of pictures", _INK, font, anchor="ma")
    return _save(path, page)
