"""From a job to the task that the loop trains: load the base, choose the shots, fill the store, build the head.

Test pictures are not read here: everything that is chosen is chosen by pictures kept from the shots.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.studio.adapter import Adapter, Card
from graft.studio.config import from_dict, to_dict
from graft.studio.labelled.splits import FILE
from graft.studio.registry import kept, method_class
from graft.vlm.base import ClipBase, load_base
from graft.vlm.data import DataConfig, FitData, fit_data, labels_of
from graft.vlm.head import Classifier, Head, HeadMethod, Setting, Shots
from graft.vlm.pictures import load_view
from graft.vlm.store import FeatureStore

if TYPE_CHECKING:
    from graft.studio.job import Job

log = logging.getLogger("graft")
STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Mixes of the trained classifier with zero-shot that the guard chooses from; the first of equals is taken."""


class Batch(NamedTuple):
    """Rows of a step."""

    inputs: Tensor
    """What the head reads, (b, ...)."""
    labels: Tensor
    """(b,) long."""


class FewShotTask(nn.Module):
    """What the loop trains; its only child is the head.

    Args:
        job: the whole of it.
        method: its method section.
        data: its data section.
        fit: the chosen shots.
        head: ready for its first step.
        shots: features of the pictures.
    """

    def __init__(self, job: Job, method: HeadMethod, data: DataConfig, fit: FitData, head: Head, shots: Shots):
        super().__init__()
        self.job, self.method, self.data, self.fit, self.shots = job, method, data, fit, shots
        self.head, self.base = head, head.setting.base
        # Features that the head reads, of every crop: the frozen part of its work is done once.
        self.inputs = None if head.reads_pixels else head.prepare(shots.crops.to(self.base.device))
        self.labels = shots.labels.to(self.base.device)

    @property
    def default_learning_rate(self) -> float:
        """The method's own."""
        return self.method.default_learning_rate

    def origin(self) -> dict[str, str]:
        """Digests of the base and of the shots."""
        return {"base": self.base.name, "base_hash": self.base.hash, "data_digest": self.fit.digest}

    def files(self) -> dict[str, str]:
        """What the run folder gets beside the job: the split."""
        return {FILE: self.fit.split.text}

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Pictures without repetition, each in one of its crops: a pure function of the generator's state."""
        count = len(self.labels)
        size = count if self.head.full_batch else min(count, self.job.train.batch_size)
        rows = torch.randperm(count, generator=generator)[:size]
        views = torch.randint(self.shots.crops.shape[1], (size,), generator=generator)
        if self.inputs is not None:
            return Batch(self.inputs[rows, views], self.labels[rows])
        first = int(self.shots.pooled.shape[1] > 1)
        pairs = zip(rows.tolist(), views.tolist(), strict=True)
        pixels = [load_view(self.fit.train[row], view + first, self.base.preprocess, self.data) for row, view in pairs]
        return Batch(torch.stack(pixels), self.labels[rows])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss, and the share of right answers."""
        labels = batch.labels.to(self.labels.device)
        loss, logits = self.head.loss(batch.inputs.to(self.labels.device), labels)
        return loss, {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draws nothing."""
        return []

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """The trained head, guarded: on the pictures kept back it is never worse than zero-shot."""
        self.head.eval()
        chosen = self.head.finish(self.shots)
        strength, judged = self._guard()
        setting = self.head.setting
        card = Card(
            method=self.job.method["name"],
            config=to_dict(self.method),
            domain="vlm",
            base=self.base.name,
            base_hash=self.base.hash,
            sites=getattr(self.head, "sites", []),
            metrics={**metrics, **chosen, **judged},
            data_digest=self.fit.digest,
            details={"classes": list(setting.names), "templates": list(setting.templates), "strength": strength},
        )
        return Adapter(self.head.tensors(), card)

    @torch.no_grad()
    def _guard(self) -> tuple[float, dict[str, Any]]:
        """How far to trust what was learnt, by the pictures that were kept back."""
        wanted, pooled = self.shots.held_labels, self.shots.held_pooled
        if not len(wanted):
            log.warning("no pictures were kept back: nothing says whether this is better than zero-shot")
            return 1.0, {"validation": None}
        mixes = {t: _accuracy(logits, wanted) for t, logits in self._mixtures(pooled.to(self.base.device))}
        strength = max(mixes, key=lambda t: mixes[t])
        if mixes[1.0] < mixes[0.0]:
            log.warning("worse than zero-shot on the pictures kept back: %.3f < %.3f", mixes[1.0], mixes[0.0])
        figures = {"zero_shot": mixes[0.0], "trained": mixes[1.0], "mixed": mixes[strength], "pictures": len(wanted)}
        if not self.head.reads_pixels:
            return strength, {"validation": figures}
        self.head.strengthen(strength)
        return 1.0, {"validation": figures, "strength": strength}

    def _mixtures(self, pooled: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Logits on the pictures kept back, between trained and zero-shot: of outputs, or of the towers themselves."""
        if self.head.reads_pixels:
            views = [load_view(each, 0, self.base.preprocess, self.data) for each in self.fit.validation]
            for strength in STRENGTHS:
                self.head.strengthen(strength)
                yield (
                    strength,
                    torch.cat([self.head(part.to(self.base.device)) for part in torch.stack(views).split(64)]),
                )
            return
        plain = self.head.setting.zero_shot(self.base.project(pooled))
        adapted = self.head(self.head.prepare(pooled))
        yield from ((strength, plain + strength * (adapted - plain)) for strength in STRENGTHS)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1).cpu() == labels).float().mean())


def prepare(job: Job, run_folder: Path | None = None) -> FewShotTask:
    """The task of one job, ready for its first step.

    Raises:
        InputError: anything wrong with base, data or method; nothing has been trained then.
    """
    section = {key: value for key, value in job.method.items() if key != "name"}
    method: Any = from_dict(method_class("vlm", str(job.method["name"])), section, "method")
    data = from_dict(DataConfig, dict(job.data), "data")
    base = kept(load_base, job.base, job.train.device, job.train.attention)
    return prepared(job, method, data, base)


def prepared(job: Job, method: Any, data: DataConfig, base: ClipBase, store: FeatureStore | None = None) -> FewShotTask:
    """The task of one job on a loaded base."""
    fit, store = fit_data(data), store or FeatureStore()
    setting = Setting(base, fit.names, data.templates)
    shots = features_of(base, fit, data, store)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.train.seed)
        head = method.build(setting).to(base.device)
        head.start(shots)
    if len(shots.held_labels):
        logits = setting.zero_shot(base.project(shots.held_pooled.to(base.device)))
        log.info("zero-shot on %d pictures kept back: %.3f", len(logits), _accuracy(logits, shots.held_labels))
    task = FewShotTask(job, method, data, fit, head, shots)
    if hasattr(head, "probe"):
        head.probe(lambda: task(task.batch(0, torch.Generator().manual_seed(0)))[0])
    return task


def features_of(base: ClipBase, fit: FitData, data: DataConfig, store: FeatureStore) -> Shots:
    """Features of all views of the shots, from the store."""
    pooled = store.get(base, fit.train, data, range(data.views + 1))
    held = store.get(base, fit.validation, data, [0])[:, 0] if fit.validation else pooled[:0, 0]
    log.info("features: %d views computed, %d found", store.computed, pooled.shape[:2].numel() - store.computed)
    return Shots(pooled, labels_of(fit.train), held, labels_of(fit.validation))


def classifier(task: FewShotTask, adapter: Adapter) -> Classifier:
    """What `adapter.attached(base)` would give, from the task that trained it."""
    return Classifier(task.method, task.head, float(adapter.card.details["strength"]))
