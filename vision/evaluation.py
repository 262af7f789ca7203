"""How well an adapter tells pictures apart, on pictures that it was not trained on; and predictions for new ones.

The base is measured beside it without any training: a picture belongs to the class whose mean training feature is
nearest (by cosine).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import normalize

from graft.studio.caches import Cache
from graft.studio.errors import DataError, InputError
from graft.studio.labelled.figures import class_accuracy, figures_of
from graft.studio.labelled.predictions import open_files, told
from graft.studio.labelled.report import Known, Seen, write_report
from graft.studio.labelled.sources import Item, Source, open_source
from graft.studio.labelled.splits import FILE, Split, asked
from graft.vision.base import VisionBase
from graft.vision.data import DataConfig, Pictures, load_part
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
    source = open_source(DataConfig(path=settings.path, dataset=settings.dataset))
    split, items = asked(source, settings.split, settings.part)
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
        if out is not None:
            known = None
            if split is not None and (trained_on := split.part("train")):
                train = _opened(base, source, trained_on, classes, settings)
                known = Known(features(base, train.pixels), train.labels, lambda rows: train.pixels[list(rows)])
            own = features(base, shown.pixels)
            seen = Seen(shown.names, shown.labels, logits, classes, lambda rows: shown.pixels[list(rows)], own, known)
            write_report(out, seen, settings.bins)
    figures = figures_of(logits, shown.labels, settings.bins)
    trained = set() if split is None else {split.digests.get(item.name) for item in split.part("train")} - {None}
    figures["trained_on"] = 0 if settings.part == "train" else sum(digest in trained for digest in shown.digests)
    if figures["trained_on"]:
        log.warning("%d of %d pictures are also among those that were trained on", figures["trained_on"], len(shown))
    return figures


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
        "mean_class_accuracy": float(class_accuracy(scores, shown.labels).nanmean()),
        "pictures": len(shown),
    }


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
    pictures = open_files(paths, background)
    with adapter.attached(base) if adapter is not None else nullcontext():
        pixels = torch.stack([base.pixels(picture) for picture in pictures.values()])
        probabilities = predict_pixels(base, pixels).softmax(1)
    return told(pictures, probabilities, classes, top)
