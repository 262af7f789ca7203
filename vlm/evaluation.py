"""How well classes are told apart, how well the probabilities are meant, and where the errors are.

*Accuracy* counts pictures; *class accuracy* is the mean over classes, so that a large class does not hide small ones.
*Calibration error* (Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599) is the mean distance
between confidence and accuracy over 15 bins of confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from graft.studio.disk import write_json
from graft.studio.errors import InputError
from graft.vlm.data import TEMPLATES, DataConfig, Example, labels_of, read_test
from graft.vlm.head import Classifier, Setting
from graft.vlm.pictures import load_view
from graft.vlm.store import FeatureStore

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run
    from graft.vlm.base import ClipBase


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures on. `graft eval` fills in what the run's data section says."""

    path: str = ""
    """Folder with test pictures: of its splits or of `test`; all pictures of a plain folder of class folders."""
    splits: str = ""
    """File with the splits, if not splits.jsonl in the folder."""
    names: str = ""
    """JSON file {folder: name} with what classes are called."""
    classes: Literal["all", "base", "new"] = "all"
    """All classes, or the first or second half of them, told apart among themselves."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts of the base's zero-shot classifier."""
    background: str = "white"
    """What transparent pictures are laid on."""
    report: str = ""
    """JSON file to write accuracy by class and the commonest confusions to."""

    @property
    def data(self) -> DataConfig:
        """The same for the reader of pictures.

        Raises:
            InputError: no folder was named.
        """
        if not self.path:
            raise InputError("eval.path", "there is nothing to measure on", "Name a folder with --data")
        same = {key: getattr(self, key) for key in ("path", "splits", "names", "classes", "templates", "background")}
        return DataConfig(**same)


def run_settings(run: Run, path: str | None = None) -> dict[str, Any]:
    """The evaluation settings of a run: what its data section says, perhaps with other pictures."""
    known = {field.name for field in fields(EvaluationConfig)}
    told = {key: value for key, value in run.job.data.items() if key in known}
    return {**told, "path": path} if path else told


def evaluate(base: ClipBase, adapter: Adapter | None, settings: EvaluationConfig) -> dict[str, Any]:
    """Measures an adapter on test pictures, or the base's zero-shot classifier.

    Args:
        base: the adapter's own.
        adapter: None measures the base.
        settings: pictures, names and prompts.

    Returns:
        `accuracy`, `class_accuracy`, `calibration_error`, `pictures` and `worst`, the classes told least.

    Raises:
        InputError: no pictures, or classes that the adapter does not know.
    """
    names, examples = read_test(settings.data)
    if adapter is None:
        setting = Setting(base, names, settings.templates)
        pooled = FeatureStore().get(base, examples, settings.data, [0])[:, 0]
        logits = setting.zero_shot(base.project(pooled.to(base.device))).cpu()
    else:
        with adapter.attached(base) as attached:
            fitting = attached if attached.names == names else _for_classes(attached, names)
            logits = logits_of(fitting, examples, settings.data)
    figures = measure(logits, labels_of(examples))
    by_class = class_accuracy(logits, labels_of(examples))
    if settings.report and adapter is not None:
        write_json(Path(settings.report), report(logits, labels_of(examples), names))
    worst = by_class.nan_to_num(2).argsort()[:3].tolist()
    return {**figures, "worst": [f"{names[k]} {by_class[k]:.2f}" for k in worst]}


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


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and calibration of logits (n, c)."""
    return {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "class_accuracy": float(class_accuracy(logits, labels).nanmean()),
        "calibration_error": calibration_error(logits.softmax(-1), labels),
        "pictures": len(labels),
    }


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers by class, (c,); not a number for classes without pictures."""
    hits = (logits.argmax(1) == labels).float()
    count = torch.bincount(labels, minlength=logits.shape[1])
    return torch.zeros(logits.shape[1]).index_add(0, labels, hits) / count


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean over pictures of |confidence - accuracy| of their bin."""
    confidence, answer = probabilities.max(-1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add(0, place, confidence - (answer == labels).float())
    return float(gap.abs().sum() / len(labels))


def report(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Accuracy by class, and the ten commonest confusions."""
    by_class = class_accuracy(logits, labels)
    confusion = torch.zeros(len(names), len(names), dtype=torch.long)
    confusion.index_put_((labels, logits.argmax(1)), torch.ones_like(labels), accumulate=True)
    confusion.fill_diagonal_(0)
    top = confusion.flatten().topk(min(10, confusion.numel()))
    pairs = [(int(k) // len(names), int(k) % len(names), int(n)) for k, n in zip(top.indices, top.values, strict=True)]
    return {
        "classes": {name: None if by_class[k].isnan() else float(by_class[k]) for k, name in enumerate(names)},
        "confusions": [{"is": names[a], "called": names[b], "pictures": n} for a, b, n in pairs if n],
        **measure(logits, labels),
    }


def harmonic_mean(base: float, new: float) -> float:
    """Of the accuracies on base and new classes."""
    return 2 * base * new / (base + new) if base + new else 0.0
