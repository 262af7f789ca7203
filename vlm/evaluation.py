"""How well an adapter tells classes apart, beside the base's zero-shot classifier, on pictures that it has not seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from graft.studio.errors import InputError
from graft.studio.labelled.figures import class_accuracy, figures_of
from graft.studio.labelled.predictions import open_files, told
from graft.studio.labelled.report import Known, Seen, write_report
from graft.studio.labelled.splits import FILE
from graft.vlm.data import TEMPLATES, DataConfig, Example, Measured, labels_of, measured_data
from graft.vlm.head import Classifier, Setting
from graft.vlm.pictures import load_view, to_pixels
from graft.vlm.store import FeatureStore

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run
    from graft.vlm.base import ClipBase


log = logging.getLogger("graft")


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures on. `graft eval` fills in what the run's data section says."""

    path: str = ""
    """Pictures in class folders, a table or arrays, as `[data]` has them."""
    dataset: str = ""
    """Instead of a path, a built-in set."""
    split: str = ""
    """Split file of the run; without one the test part that the data declare is measured, or else all pictures."""
    part: Literal["test", "val", "train"] = "test"
    """Which part of the split."""
    names: str = ""
    """JSON file {class: name} with what classes are called in prompts."""
    classes: Literal["all", "base", "new"] = "all"
    """All classes, or the first or second half of them, told apart among themselves."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts of the base's zero-shot classifier."""
    bins: int = 15
    """Of confidence, for the calibration error."""
    background: str = "white"
    """What transparent pictures are laid on."""

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise InputError(f"bins = {self.bins}", "expected 1 or more", "15 is usual")

    @property
    def data(self) -> DataConfig:
        """The same for the reader of pictures.

        Raises:
            InputError: no pictures were named.
        """
        if not self.path and not self.dataset:
            raise InputError("eval.path", "there is nothing to measure on", "Name a folder with --data")
        known = {field.name for field in fields(DataConfig)}
        return DataConfig(**{field.name: getattr(self, field.name) for field in fields(self) if field.name in known})


def run_settings(run: Run, path: str | None = None) -> dict[str, Any]:
    """The evaluation settings of a run: its data section and the split that it was trained on, or other pictures."""
    known = {field.name for field in fields(EvaluationConfig)}
    told = {key: value for key, value in run.job.data.items() if key in known}
    if path:
        return {key: value for key, value in told.items() if key not in ("dataset", "split")} | {"path": path}
    return told | {"split": str(run.folder / FILE)}


def evaluate(
    base: ClipBase, adapter: Adapter | None, settings: EvaluationConfig, out: Path | None = None
) -> dict[str, Any]:
    """Measures an adapter on test pictures, or the base's zero-shot classifier.

    Args:
        base: the adapter's own.
        adapter: None measures the base.
        settings: pictures, names and prompts.
        out: folder for pictures of the result and tables; None writes none.

    Returns:
        `accuracy`, `mean_class_accuracy`, `pictures`, `loss`, `calibration_error`, `worst` (the classes told least) and
        `trained_on`, how many of the pictures were.

    Raises:
        InputError: no pictures, or classes that the adapter does not know.
    """
    names, examples, fit = measured_data(settings.data, settings.part)
    if adapter is None:
        setting = Setting(base, names, settings.templates)
        pooled = FeatureStore().get(base, examples, settings.data, [0])[:, 0]
        logits = setting.zero_shot(base.project(pooled.to(base.device))).cpu()
        if out is not None:
            _write(out, base, None, (names, examples, fit), logits, settings)
    else:
        with adapter.attached(base) as attached:
            fitting = attached if attached.names == names else _for_classes(attached, names)
            logits = logits_of(fitting, examples, settings.data)
            if out is not None:
                _write(out, base, fitting, (names, examples, fit), logits, settings)
    labels = labels_of(examples)
    by_class = class_accuracy(logits, labels).nan_to_num(2)
    worst = [f"{names[k]} {by_class[k]:.2f}" for k in by_class.argsort()[:3].tolist()]
    trained = {example.digest for example in fit.train} if fit is not None and settings.part != "train" else set()
    seen = sum(example.digest in trained for example in examples)
    if seen:
        log.warning("%d of %d pictures are also among those that were trained on", seen, len(examples))
    return {**figures_of(logits, labels, settings.bins), "worst": worst, "trained_on": seen}


def _write(
    out: Path,
    base: ClipBase,
    classifier: Classifier | None,
    measured: Measured,
    logits: Tensor,
    settings: EvaluationConfig,
) -> None:
    """The folder of pictures and tables; features are those of the tower that the classifier reads."""
    names, examples, fit = measured
    data = settings.data

    def pixels_of(of: Sequence[Example], rows: Sequence[int]) -> Tensor:
        return torch.stack([load_view(of[row], 0, base.preprocess, data) for row in rows])

    @torch.no_grad()
    def features_of(of: Sequence[Example]) -> Tensor:
        if classifier is None or not classifier.head.reads_pixels:
            return base.project(FeatureStore().get(base, of, data, [0])[:, 0].to(base.device)).float().cpu()
        parts = torch.arange(len(of)).split(64)
        return torch.cat([base.encode_image(pixels_of(of, part.tolist())).float().cpu() for part in parts])

    train = fit.train if fit is not None else ()
    known = Known(features_of(train), labels_of(train), partial(pixels_of, train)) if train else None
    pixels = partial(pixels_of, examples)
    seen = Seen([e.name for e in examples], labels_of(examples), logits, names, pixels, features_of(examples), known)
    write_report(out, seen, settings.bins)


def _for_classes(classifier: Classifier, names: tuple[str, ...]) -> Classifier:
    """A classifier for exactly these classes: new ones, where the method can, or fewer or reordered ones."""
    own = classifier.names
    if set(names) <= set(own):
        return _Columns(classifier, [own.index(name) for name in names])
    return classifier.renamed(names)


class _Columns(Classifier):
    """Some classes of a classifier, in another order."""

    def __init__(self, of: Classifier, columns: list[int]):
        super().__init__(of.method, of.head, of.strength)
        self.columns = columns

    def logits(self, pooled: Tensor) -> Tensor:
        return super().logits(pooled)[:, self.columns]

    def logits_of_pixels(self, pixels: Tensor) -> Tensor:
        logits = super().logits_of_pixels(pixels)
        return logits[:, self.columns] if self.head.reads_pixels else logits


@torch.no_grad()
def logits_of(classifier: Classifier, examples: Sequence[Example], data: DataConfig) -> Tensor:
    """Logits of pictures, (n, c): from stored features, unless the towers themselves were changed."""
    base = classifier.head.setting.base
    if not classifier.head.reads_pixels:
        pooled = FeatureStore().get(base, examples, data, [0])[:, 0]
        return torch.cat([classifier.logits(part) for part in pooled.split(256)])
    parts = []
    for start in range(0, len(examples), 64):
        views = [load_view(example, 0, base.preprocess, data) for example in examples[start : start + 64]]
        parts.append(classifier.logits_of_pixels(torch.stack(views)))
    return torch.cat(parts)


@torch.no_grad()
def predict(
    base: ClipBase,
    adapter: Adapter | None,
    paths: Sequence[str | Path],
    top: int = 3,
    background: str = "white",
    classes: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
) -> list[dict[str, Any]]:
    """Tells what pictures show.

    Args:
        base: the adapter's own.
        adapter: None is zero-shot, for which `classes` must be given.
        paths: picture files, or folders of them.
        top: how many classes are named.
        background: behind transparent pictures.
        classes: names to choose from; empty takes the adapter's. New ones need a method that carries over to them.
        templates: prompts of zero-shot, with {} for the name.

    Returns:
        For each picture `picture`, `label`, `probability` and `top`, the surest classes first.

    Raises:
        DataError: files that are no pictures.
        InputError: no classes, or new ones for what was learnt on others.
    """
    if adapter is None and len(classes) < 2:
        raise InputError(base.name, f"{len(classes)} classes are nothing to choose from", "Give two or more in classes")
    names = tuple(" ".join(name.replace("_", " ").split()) for name in classes)
    pictures = open_files(paths, background)
    pixels = torch.stack([to_pixels(picture, base.preprocess) for picture in pictures.values()])
    if adapter is None:
        setting = Setting(base, names, tuple(templates))
        logits = torch.cat([setting.zero_shot(base.encode_image(part).float()).cpu() for part in pixels.split(64)])
        return told(pictures, logits.softmax(1), names, top)
    with adapter.attached(base) as attached:
        fitting = _for_classes(attached, names) if names and attached.names != names else attached
        logits = torch.cat([fitting.logits_of_pixels(part) for part in pixels.split(64)])
    return told(pictures, logits.softmax(1), names or attached.names, top)


def harmonic_mean(base: float, new: float) -> float:
    """Of the accuracies on base and new classes."""
    return 2 * base * new / (base + new) if base + new else 0.0
