"""Pictures of results: what was taken for what, which classes are confused, what is like what."""

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
        best = int(told.argmax())
        right = labels is None or best == int(labels[k])
        _frame(page, picture, left, top, _RIGHT if right else _WRONG)
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


_HUES = ("#1f7a54", "#c2410c", "#2563eb", "#a21caf", "#b45309", "#0e7490", "#dc2626", "#4d7c0f", "#7c3aed", "#be185d")


def feature_map(path: Path, places: Tensor, labels: Tensor, told: Tensor, classes: Sequence[str]) -> Path:
    """Draws pictures as dots, each class in its colour with its name at its middle; mistakes are rings.

    Args:
        path: of the PNG file.
        places: (n, 2).
        labels: (n,).
        told: (n,), what the classifier answered.
        classes: names; colours repeat after ten.
    """
    side, margin = 640, 50
    page = Image.new("RGB", (side, side + 18), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    low, high = places.min(0).values, places.max(0).values
    at = margin + (places - low) / (high - low).clamp(min=1e-12) * (side - 2 * margin)
    for (x, y), label, answer in zip(at.tolist(), labels.tolist(), told.tolist(), strict=True):
        colour = _HUES[label % len(_HUES)]
        box = (x - 3, side - y - 3, x + 3, side - y + 3)
        pen.ellipse(box, fill=colour if answer == label else "white", outline=colour)
    for label in labels.unique().tolist():
        x, y = at[labels == label].mean(0).tolist()
        pen.text(
            (x, side - y), _short(classes[label], 16), _INK, font, anchor="mm", stroke_width=2, stroke_fill="white"
        )
    pen.text((8, side), "two principal components of the features; rings are mistakes", _INK, font)
    return _save(path, page)


def neighbours(
    path: Path,
    pixels: Tensor,
    labels: Tensor,
    near: Tensor,
    near_labels: Tensor,
    likeness: Tensor,
    classes: Sequence[str],
) -> Path:
    """Draws each picture beside the training pictures that are most like it, framed by whether the class is its own.

    Args:
        path: of the PNG file.
        pixels: (n, 3, h, w) uint8.
        labels: (n,).
        near: (n, k, 3, h, w) uint8.
        near_labels: (n, k).
        likeness: (n, k) cosines.
        classes: names.
    """
    line, gap = 14, 6
    width, height = TILE + gap, TILE + line + gap
    page = Image.new("RGB", ((1 + near.shape[1]) * width + 3 * gap, len(pixels) * height + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)

    for i, picture in enumerate(pixels):
        top, own = gap + i * height, int(labels[i])
        _frame(page, picture, gap, top, _INK)
        pen.text((gap, top + TILE), _short(classes[own], 15), _INK, font)
        for j, other in enumerate(near[i]):
            label, left = int(near_labels[i, j]), 3 * gap + (1 + j) * width
            _frame(page, other, left, top, _RIGHT if label == own else _WRONG)
            pen.text((left, top + TILE), f"{_short(classes[label], 10)} {float(likeness[i, j]):.2f}", _INK, font)
    return _save(path, page)


def _frame(page: Image.Image, picture: Tensor, left: int, top: int, colour: Any) -> None:
    """A picture (3, h, w) uint8 as a tile with a frame."""
    tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
    page.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST if tile.width < TILE else None), (left, top))
    ImageDraw.Draw(page).rectangle((left, top, left + TILE - 1, top + TILE - 1), outline=colour, width=2)
