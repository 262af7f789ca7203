"""A folder that shows what a classifier did: confusions, calibration, mistakes, the map of features, neighbours."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graft.studio.labelled import drawings
from graft.studio.labelled.figures import calibration, confusion, nearest, principal

Pixels = Callable[[Sequence[int]], Tensor]
"""Pictures of some rows, (n, 3, h, w) uint8."""
SHOWN = 24
"""Mistakes on a sheet."""
ASKED = 8
"""Pictures whose neighbours are drawn."""


@dataclass(frozen=True)
class Known:
    """Pictures that were trained on."""

    features: Tensor
    """(m, d)."""
    labels: Tensor
    """(m,)."""
    pixels: Pixels


@dataclass(frozen=True)
class Seen:
    """Pictures that were measured."""

    names: Sequence[str]
    """Of the pictures."""
    labels: Tensor
    """(n,)."""
    logits: Tensor
    """(n, c)."""
    classes: Sequence[str]
    """Names, c of them."""
    pixels: Pixels
    features: Tensor
    """(n, d): what the classifier sees of them."""
    known: Known | None = None
    """Where neighbours are looked for."""


def write_report(out: Path, seen: Seen, bins: int = 15) -> None:
    """Writes confusion matrix, reliability diagram, surest mistakes, map, neighbours, and tables of classes and
    predictions.

    Args:
        out: folder.
        seen: what was measured.
        bins: of confidence.
    """
    out.mkdir(parents=True, exist_ok=True)
    probabilities, labels, classes = seen.logits.softmax(1), seen.labels, seen.classes
    drawings.confusion_picture(out / "confusion.png", confusion(seen.logits, labels), classes)
    drawings.reliability_picture(out / "reliability.png", *calibration(probabilities, labels, bins))
    confidence, told = probabilities.max(1)
    wrong = torch.nonzero(told != labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)]
    if len(worst):
        rows = worst[:SHOWN].tolist()
        drawings.sheet(out / "mistakes.png", seen.pixels(rows), probabilities[rows], labels[rows], classes)
    if len(labels) > 2:
        drawings.feature_map(out / "map.png", principal(seen.features), labels, told, classes)
    if seen.known is not None and len(seen.known.labels):
        spread = torch.linspace(0, len(labels) - 1, ASKED).long().tolist()
        rows = list(dict.fromkeys([*worst[: ASKED // 2].tolist(), *spread]))[:ASKED]
        places, likeness = nearest(seen.features[rows], seen.known.features)
        asked = seen.pixels(rows), labels[rows]
        near = torch.stack([seen.known.pixels(each) for each in places.tolist()]), seen.known.labels[places]
        drawings.neighbours(out / "neighbours.png", *asked, *near, likeness, classes)
    _tables(out, seen, confidence, told)


def _tables(out: Path, seen: Seen, confidence: Tensor, told: Tensor) -> None:
    counts, classes = confusion(seen.logits, seen.labels), seen.classes
    with (out / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "pictures", "right", "accuracy", "most often taken for"])
        for k, name in enumerate(classes):
            total, right, others = int(counts[k].sum()), int(counts[k, k]), counts[k].copy()
            others[k] = 0
            confused = classes[int(others.argmax())] if others.any() else ""
            writer.writerow([name, total, right, f"{right / total:.4f}" if total else "", confused])
    with (out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "class", "told", "probability"])
        for name, label, best, sure in zip(seen.names, seen.labels, told, confidence, strict=True):
            writer.writerow([name, classes[int(label)], classes[int(best)], f"{float(sure):.4f}"])
