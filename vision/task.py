"""The training task that a vision job hands to the loop: pictures from memory, one forward, cross entropy.

The task holds the training and the validation pictures and nothing by which it could open a test picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graft.studio.adapter import Adapter, Card
from graft.studio.config import to_dict
from graft.studio.labelled.splits import FILE, Split
from graft.vision.base import VisionBase, classifiers
from graft.vision.data import Pictures
from graft.vision.head import Adapted, HeadSlot
from graft.vision.method import VisionMethod

BATCH = 128
"""Pictures in a forward pass without gradients."""


@dataclass(frozen=True)
class FitData:
    """All that a training may see."""

    split: Split
    """Names and labels; of test pictures no more than these."""
    train: Pictures
    """What is trained on."""
    val: Pictures
    """What is validated on; may be empty."""
    augment: Literal["none", "flip", "crop", "zoom"] = "none"
    """As in the config."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.split.classes


class Batch(NamedTuple):
    """Pictures (b, 3, h, w) uint8 or, where they are frozen, their features; and labels (b,)."""

    inputs: Tensor
    labels: Tensor


class VisionTask(nn.Module):
    """What the loop trains; `parameters()` and the saved state are those of the bank, the only child.

    Args:
        base: frozen, with the adapter attached.
        handle: of the adapter.
        method: its settings.
        data: training and validation pictures.
        batch_size: rows of a batch.
        weight_decay: of matrices; 0 takes the method's.
    """

    def __init__(
        self,
        base: VisionBase,
        handle: Adapted,
        method: VisionMethod,
        data: FitData,
        batch_size: int,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        self.base, self.handle, self.method, self.data = base, handle, method, data
        self.batch_size, self.weight_decay = batch_size, weight_decay
        self.bank = handle.bank
        self.name = ""
        self.features: Tensor | None = None
        if method.frozen_features and data.augment == "none" and len(classifiers(base.model)) == 1:
            self.features = features(base, data.train.pixels)

    @property
    def default_learning_rate(self) -> float:
        """The method's own."""
        return self.method.default_learning_rate

    def origin(self) -> dict[str, str]:
        """Digests of the base and of the split with its pictures."""
        return {"base": self.base.name, "base_hash": self.base.hash, "data_digest": self.data.split.digest}

    def files(self) -> dict[str, str]:
        """What the run folder gets beside the job: the split."""
        return {FILE: self.data.split.text}

    @torch.no_grad()
    def start_head(self) -> None:
        """Solves the classifier for the training pictures, unchanged, as the model sees them before the first step."""
        from graft.vision.head_start import solve_probe

        mode = self.bank.training
        self.bank.eval()  # without dropout
        try:
            found = inputs_of_classifiers(self.base, self.data.train.pixels)
        finally:
            self.bank.train(mode)
        tensors = self.handle.head.tensors()
        for name, inputs in found.items():
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = solve_probe(
                inputs, self.data.train.labels, len(self.data.classes)
            )
        self.handle.head.load(tensors)

    def param_groups(self) -> list[dict[str, Any]]:
        """Method and classifier, each with its learning rate; vectors are not pulled to zero."""
        decay = self.weight_decay or self.method.default_weight_decay
        groups = []
        for part in self.handle.parts:
            scale = self.method.head_lr_scale if part is self.handle.head else 1.0
            stacked = getattr(part, "stacked", True)  # slots come first in a stack
            matrices = [p for p in part.bank.parameters() if p.dim() - stacked > 1]
            vectors = [p for p in part.bank.parameters() if p.dim() - stacked <= 1]
            groups += [
                {"params": matrices, "lr_scale": scale, "weight_decay": decay},
                {"params": vectors, "lr_scale": scale, "weight_decay": 0.0},
            ]
        return [group for group in groups if group["params"]]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Rows of one step: no picture twice before every one came once, as far as the pictures reach."""
        count = len(self.data.train)
        rounds = -(-self.batch_size // count)
        rows = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[: self.batch_size]
        labels = self.data.train.labels[rows]
        if self.features is not None:
            return Batch(self.features[rows], labels)
        return Batch(augmented(self.data.train.pixels[rows], self.data.augment, generator), labels)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, and the share of rows told rightly."""
        labels = batch.labels.to(self.base.device)
        if self.features is not None:
            head = next(module for module in self.bank.modules() if isinstance(module, HeadSlot))
            logits = head.logits(batch.inputs.to(self.base.device))
        else:
            logits = self.base.model(self.base.normalise(batch.inputs))
        hit = (logits.argmax(1) == labels).float().mean()
        return cross_entropy(logits.float(), labels), {"accuracy": hit}

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draws validation pictures (training pictures where there are none) with what they are told to be."""
        from graft.studio.labelled.drawings import sheet

        shown = self.data.val if len(self.data.val) else self.data.train
        rows = torch.arange(min(len(shown), 24))
        found = self._logits(shown.pixels[rows]).softmax(1)
        path = Path(folder) / f"step-{step:06d}.png"
        return [sheet(path, shown.pixels[rows], found, shown.labels[rows], self.data.classes)]

    def _logits(self, pixels: Tensor) -> Tensor:
        mode = self.bank.training
        self.bank.eval()
        try:
            return predict_pixels(self.base, pixels)
        finally:
            self.bank.train(mode)

    def validate(self) -> dict[str, float]:
        """Accuracy and cross entropy on the validation pictures; nothing without any."""
        if not len(self.data.val):
            return {}
        logits, labels = self._logits(self.data.val.pixels), self.data.val.labels
        hits = (logits.argmax(1) == labels).float().mean()
        return {"val_accuracy": float(hits), "val_loss": float(cross_entropy(logits, labels))}

    def adapter(self, metrics: dict[str, Any], slot: int = 0) -> Adapter:
        """What has been learnt so far: the method's tensors, the classifier, and the names of its classes."""
        trained = sum(parameter.numel() for parameter in self.bank.parameters())
        head = sum(parameter.numel() for parameter in self.handle.head.bank.parameters())
        counts = {"parameters": trained - head, "head_parameters": head}
        details = {
            "classes": list(self.data.classes),
            "side": self.base.side,
            "preprocessing": self.base.preprocessing,
            "shots": {part: len(getattr(self.data, part)) for part in ("train", "val")},
        }
        card = Card(
            method=self.name,
            config=to_dict(self.method),
            domain="vision",
            base=self.base.name,
            base_hash=self.base.hash,
            sites=self.handle.plan.to_list(),
            metrics=metrics | counts | self.validate(),
            data_digest=self.data.split.digest,
            details=details,
        )
        return Adapter(self.handle.tensors(slot), card)


@torch.no_grad()
def features(base: VisionBase, pixels: Tensor) -> Tensor:
    """What the model's only classifier is called on, for pictures (n, 3, h, w) uint8: (n, d) float32, on the CPU."""
    (found,) = inputs_of_classifiers(base, pixels).values()
    return found


@torch.no_grad()
def inputs_of_classifiers(base: VisionBase, pixels: Tensor) -> dict[str, Tensor]:
    """What each of the model's classifiers, by path, is called on, for pictures as above."""
    heads = classifiers(base.model)
    seen: dict[str, list[Tensor]] = {name: [] for name in heads}
    hooks = [
        head.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].float().cpu()))  # type: ignore[misc]
        for name, head in heads.items()
    ]
    try:
        for part in pixels.split(BATCH):
            base.model(base.normalise(part))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.no_grad()
def predict_pixels(base: VisionBase, pixels: Tensor) -> Tensor:
    """Logits of pictures (n, 3, h, w) uint8 by the model with whatever is attached: (n, c) float32, on the CPU."""
    return torch.cat([base.model(base.normalise(part)).float().cpu() for part in pixels.split(BATCH)])


def augmented(pixels: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Pictures (b, 3, h, w) uint8 under random changes by torchvision, each its own; drawn from the generator alone."""
    if kind == "none":
        return pixels
    from torchvision.transforms import v2

    flip = v2.RandomHorizontalFlip()
    crop = v2.RandomResizedCrop(pixels.shape[-2:], scale=(0.5, 1.0), ratio=(0.8, 1.25), antialias=True)
    change = {"flip": flip, "zoom": crop, "crop": v2.Compose([crop, flip])}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([change(each) for each in pixels])
