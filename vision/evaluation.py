"""How well an adapter tells pictures apart, on pictures that it was not trained on; and predictions for new ones.

The base is measured beside it without any training: a picture belongs to the class whose mean training feature is
nearest (by cosine). Accuracy is given over pictures and as the mean over classes, since they differ when classes do not
have equally many pictures. The calibration error is that of Guo et al., On Calibration of Modern Neural Networks, 2017,
arXiv:1706.04599: the mean distance between confidence and accuracy over equal bins of confidence.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from graft.studio.caches import Cache
from graft.studio.errors import DataError, InputError
from graft.studio.pictures import BROKEN, SUFFIXES, checked_bytes, complaint, find_pictures, open_picture
from graft.vision.base import VisionBase
from graft.vision.data import DataConfig, Item, Pictures, Source, load_part, open_source
from graft.vision.splits import FILE, Split, read_split
from graft.vision.task import features, predict_pixels

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures on. `graft eval` fills in the run's own data and split."""

    path: str = ""
    """Pictures in class folders, a table or arrays, as `[data]` has them."""
    dataset: str = ""
    """Instead of a path, a built-in set."""
    split: str = ""
    """Split file of the run; without one all pictures are measured, or the test part that the data declare."""
    part: Literal["test", "val", "train"] = "test"
    """Which part of the split."""
    bins: int = 15
    """Of confidence, for the calibration error."""
    background: str = "white"
    """What transparent pictures are laid on, as in training."""

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise InputError(f"bins = {self.bins}", "expected 1 or more", "15 is usual")


def run_settings(run: Run, path: str | None = None) -> dict[str, Any]:
    """The evaluation settings of a run: its data and the split that it was trained on, or other pictures alone."""
    if path:
        return {"path": path}
    data = {key: run.job.data[key] for key in ("path", "dataset", "background") if run.job.data.get(key)}
    return {**data, "split": str(run.folder / FILE)}


def evaluate(
    base: VisionBase, adapter: Adapter | None, settings: EvaluationConfig, out: Path | None = None
) -> dict[str, Any]:
    """Measures an adapter, or what the base's features alone are worth.

    Args:
        base: the adapter's own.
        adapter: None measures the base by its nearest class mean, for which the split must name training pictures.
        settings: the pictures.
        out: folder for pictures of the result and predictions.csv; None writes none.

    Returns:
        `accuracy`, `mean_class_accuracy`, `pictures`; of an adapter `loss`, `calibration_error` and `trained_on` too.

    Raises:
        DataError: no pictures, or classes that the adapter does not know.
    """
    source, split, items = _asked(settings)
    names = sorted({item.label for item in items}) if split is None else split.classes
    classes = tuple(names) if adapter is None else tuple(adapter.card.details["classes"])
    if unknown := sorted({item.label for item in items} - set(classes)):
        reason = f"the adapter does not know the classes {', '.join(unknown[:10])}"
        raise DataError(source.where, reason, f"It knows {', '.join(classes[:10])}")
    shown = _opened(base, source, items, classes, settings)
    if adapter is None:
        return _nearest_mean(base, source, split, shown, classes, settings)
    with adapter.attached(base):
        logits = predict_pixels(base, shown.pixels)
    figures = figures_of(logits, shown.labels, settings.bins)
    trained = set() if split is None else {split.digests.get(item.name) for item in split.part("train")} - {None}
    figures["trained_on"] = 0 if settings.part == "train" else sum(digest in trained for digest in shown.digests)
    if figures["trained_on"]:
        log.warning("%d of %d pictures are also among those that were trained on", figures["trained_on"], len(shown))
    if out is not None:
        _write(out, shown, logits, classes, settings.bins)
    return figures


def _asked(settings: EvaluationConfig) -> tuple[Source, Split | None, list[Item]]:
    config = DataConfig(path=settings.path, dataset=settings.dataset)
    source = open_source(config)
    if settings.split:
        split: Split | None = read_split(settings.split)
        items = split.part(settings.part) if split is not None else []
    else:
        split, items = None, [item for item in source.items if item.part == "test"] or source.items
    if not items:
        reason = f"no picture is in the part {settings.part!r}"
        raise DataError(source.where, reason, "Put data.test above 0, or give --data DIR with class folders")
    return source, split, items


def _opened(
    base: VisionBase, source: Source, items: Sequence[Item], classes: Sequence[str], settings: EvaluationConfig
) -> Pictures:
    return load_part(source, items, classes, base.pixels, base.preprocessing, Cache(), settings.background)


def _nearest_mean(
    base: VisionBase, source: Source, split: Split | None, shown: Pictures, classes: Sequence[str], settings: Any
) -> dict[str, Any]:
    if split is None:
        return {"pictures": len(shown)}
    train = _opened(base, source, split.part("train"), classes, settings)
    known = normalize(features(base, train.pixels), dim=-1)
    means = torch.stack([known[train.labels == k].mean(0) for k in range(len(classes))])
    scores = normalize(features(base, shown.pixels), dim=-1) @ normalize(means, dim=-1).T
    hits = scores.argmax(1) == shown.labels
    return {
        "accuracy": float(hits.float().mean()),
        "mean_class_accuracy": _by_class(hits, shown.labels),
        "pictures": len(shown),
    }


def figures_of(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Any]:
    """Accuracy, mean accuracy of the classes that occur, cross entropy and calibration error of logits (n, c)."""
    hits = logits.argmax(1) == labels
    return {
        "accuracy": float(hits.float().mean()),
        "mean_class_accuracy": _by_class(hits, labels),
        "pictures": len(labels),
        "loss": float(cross_entropy(logits, labels)),
        "calibration_error": calibration(logits.softmax(1), labels, bins)[1],
    }


def _by_class(hits: Tensor, labels: Tensor) -> float:
    return float(torch.stack([hits[labels == k].float().mean() for k in labels.unique()]).mean())


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[list[tuple[float, float, int]], float]:
    """Returns (mean confidence, accuracy, pictures) of every bin that is not empty, and the expected error.

    Args:
        probabilities: (n, c).
        labels: (n,).
        bins: of equal width over (0, 1].
    """
    confidence, told = probabilities.max(1)
    hits = (told == labels).float()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for k in place.unique().tolist():
        inside = place == k
        found.append((float(confidence[inside].mean()), float(hits[inside].mean()), int(inside.sum())))
    error = sum(count * abs(sure - right) for sure, right, count in found) / max(1, len(labels))
    return found, error


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Returns how often each class (rows) was taken for each (columns), (c, c)."""
    counts = np.zeros((logits.shape[1], logits.shape[1]), dtype=np.int64)
    np.add.at(counts, (labels.numpy(), logits.argmax(1).numpy()), 1)
    return counts


def _write(out: Path, shown: Pictures, logits: Tensor, classes: Sequence[str], bins: int) -> None:
    """Confusion matrix, reliability diagram, surest mistakes, errors by class, and every prediction."""
    from graft.vision.pictures import confusion_picture, reliability_picture, sheet

    out.mkdir(parents=True, exist_ok=True)
    probabilities, labels = logits.softmax(1), shown.labels
    counts = confusion(logits, labels)
    confusion_picture(out / "confusion.png", counts, classes)
    reliability_picture(out / "reliability.png", *calibration(probabilities, labels, bins))
    confidence, told = probabilities.max(1)
    wrong = torch.nonzero(told != labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:24]
    if len(worst):
        sheet(out / "mistakes.png", shown.pixels[worst], probabilities[worst], labels[worst], classes)
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
        for name, label, best, sure in zip(shown.names, labels, told, confidence, strict=True):
            writer.writerow([name, classes[int(label)], classes[int(best)], f"{float(sure):.4f}"])


def predict(
    base: VisionBase, adapter: Adapter | None, paths: Sequence[str | Path], top: int = 3, background: str = "white"
) -> list[dict[str, Any]]:
    """Tells what pictures show.

    Args:
        base: the adapter's own.
        adapter: None asks the base's own classifier.
        paths: picture files, or folders of them.
        top: how many classes are named.
        background: behind transparent pictures.

    Returns:
        For each picture `picture`, `label`, `probability` and `top`, the surest classes first.

    Raises:
        DataError: files that are no pictures.
        InputError: the base has no classifier with named classes.
    """
    classes = base.classes if adapter is None else tuple(adapter.card.details["classes"])
    if not classes:
        raise InputError(base.name, "its classifier names no classes", "Give an adapter")
    files = [f for path in map(Path, paths) for f in (find_pictures(path) if path.is_dir() else [path])]
    pixels, problems = [], []
    for file in files:
        try:
            pixels.append(base.pixels(open_picture(checked_bytes(file, 120.0), background)))
        except BROKEN as error:
            problems.append(f"{file}: {complaint(error)}")
    if problems or not files:
        reason = "\n  ".join([f"{len(problems)} cannot be read:", *problems]) if problems else "there are no pictures"
        raise DataError(", ".join(map(str, paths)), reason, f"Give {', '.join(sorted(SUFFIXES))} files or folders")
    with adapter.attached(base) if adapter is not None else nullcontext():
        probabilities = predict_pixels(base, torch.stack(pixels)).softmax(1)
    rows = []
    for file, told in zip(files, probabilities, strict=True):
        best = told.topk(min(top, len(classes)))
        named = [{"label": classes[int(k)], "probability": float(told[k])} for k in best.indices]
        rows.append({"picture": str(file), **named[0], "top": named})
    return rows
