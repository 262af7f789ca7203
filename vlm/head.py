"""What every method of this domain shares: a head on frozen features, the classifier around it, and the way to disk.

A method is a frozen dataclass that makes a `Head`: a module whose parameters are what is trained and whose forward
gives logits. Zero-shot comes first, always: every head is made from the zero-shot weights, and every classifier can be
turned back towards them by its `strength`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.errors import FormatError, InputError
from graft.vlm.base import ClipBase

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, Card


@dataclass(frozen=True, eq=False)
class Setting:
    """A base and the classes to tell apart."""

    base: ClipBase
    """Frozen."""
    names: tuple[str, ...]
    """Class names, in order of the labels."""
    templates: tuple[str, ...]
    """Prompts with {} for the name."""

    @cached_property
    def prompts(self) -> Tensor:
        """Unit features of every prompt of every class, (t, c, e)."""
        with torch.no_grad():
            texts = [template.format(name) for template in self.templates for name in self.names]
            features = F.normalize(self.base.encode_text(texts).float(), dim=-1)
        return features.view(len(self.templates), len(self.names), -1)

    @cached_property
    def weights(self) -> Tensor:
        """The zero-shot classifier (c, e): mean of the prompts' unit features, at unit length."""
        return F.normalize(self.prompts.mean(0), dim=-1)

    @cached_property
    def scale(self) -> Tensor:
        """Factor of the cosines."""
        return self.base.logit_scale.float()

    def zero_shot(self, features: Tensor) -> Tensor:
        """Zero-shot logits of features (b, e): (b, c)."""
        return self.scale * F.normalize(features, dim=-1) @ self.weights.T


@dataclass(frozen=True, eq=False)
class Shots:
    """Training pictures as the frozen tower sees them."""

    pooled: Tensor
    """(n, v, p), features before the projection of v views; view 0 is the whole picture."""
    labels: Tensor
    """(n,) long."""
    held_pooled: Tensor
    """(m, p), the whole pictures that were kept back."""
    held_labels: Tensor
    """(m,) long."""

    @property
    def crops(self) -> Tensor:
        """(n, v', p), the views to train on: the random crops, or the whole picture where there are none."""
        return self.pooled[:, 1:] if self.pooled.shape[1] > 1 else self.pooled


class Head(nn.Module):
    """Logits from frozen features; its parameters are what is trained.

    Args:
        setting: base and classes.
    """

    reads_pixels: ClassVar[bool] = False
    """Whether it needs the pictures themselves, since it changes the towers."""
    full_batch: ClassVar[bool] = False
    """Whether a step sees all pictures."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.setting = setting  # no module: the base's weights are none of ours

    def prepare(self, pooled: Tensor) -> Tensor:
        """What forward reads, from features before the projection (..., p); computed once."""
        return self.setting.base.project(pooled)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (b, c)."""
        return self.setting.zero_shot(inputs)

    def loss(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch."""
        logits = self(inputs)
        return F.cross_entropy(logits, labels), logits

    def start(self, shots: Shots) -> None:
        """Takes from the shots what is not trained."""

    def finish(self, shots: Shots) -> dict[str, Any]:
        """Chooses by the shots what is chosen after training; returns what was chosen."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def strengthen(self, strength: float) -> None:
        """Weakens a change of the towers themselves; only heads that read pixels have one."""
        raise TypeError(f"{type(self).__name__} leaves the towers alone")

    def renamed(self, setting: Setting, method: Any) -> Head:
        """The same for other classes: what depends on their names is made anew."""
        head: Head = method.build(setting)
        head.load_state_dict(self.state_dict())
        return head

    def detach(self) -> None:
        """Takes out what was put into the base."""


@dataclass(frozen=True)
class HeadMethod:
    """A method whose result is a head."""

    default_learning_rate: ClassVar[float] = 1e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "steps": 300, "batch_size": 64, "schedule": "cosine", "mixed_precision": "no"
    }  # fmt: skip
    """What a job's `[train]` says where the user does not."""
    bound: ClassVar[bool] = False
    """Whether what is learnt belongs to the training classes and says nothing of others."""

    @staticmethod
    def _check(name: str, value: object, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"method.{name} = {value!r}", f"expected {expected}", "Change it in the [method] section")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The head as it starts, or with room for saved tensors."""
        raise TypeError(f"{type(self).__name__} must define build")

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> Classifier:
        """The trained classifier on its base. Nothing of the base is changed.

        Raises:
            FormatError: tensors that do not fit.
        """
        from graft.studio.config import from_dict

        method = from_dict(cls, card.config, "adapter.json")
        setting = Setting(base, tuple(card.details["classes"]), tuple(card.details["templates"]))
        head = method.build(setting, tensors)
        try:
            head.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise FormatError("the adapter", str(error).splitlines()[-1].strip(), "Export it again") from error
        return Classifier(method, head.to(base.device), float(card.details["strength"]))

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Refuses: no other library has a file for it."""
        raise InputError(f"format {format!r}", f"{adapter.card.method} is not written in it", "Use native")


class Classifier:
    """A trained head in use.

    Args:
        method: that made it.
        head: trained.
        strength: 1 is as trained, 0 is zero-shot; between them logits are mixed.

    Example:
        >>> with adapter.attached(base) as classifier:  # doctest: +SKIP
        ...     classifier.predict([Image.open("photo.jpg")])
    """

    def __init__(self, method: Any, head: Head, strength: float = 1.0):
        self.method, self.strength = method, strength
        self.head: Any = head.eval().requires_grad_(False)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, in order of the logits."""
        return self.head.setting.names

    @torch.no_grad()
    def logits(self, pooled: Tensor) -> Tensor:
        """Logits of features before the projection: (b, p) -> (b, c), on the CPU."""
        setting = self.head.setting
        pooled = pooled.to(setting.base.device)
        adapted = self.head(self.head.prepare(pooled))
        if self.strength < 1:
            plain = setting.zero_shot(setting.base.project(pooled))
            adapted = plain + self.strength * (adapted - plain)
        return adapted.float().cpu()

    @torch.no_grad()
    def logits_of_pixels(self, pixels: Tensor) -> Tensor:
        """Logits of pictures as the preprocessing cut them: (b, 3, size, size) uint8 -> (b, c), on the CPU."""
        base = self.head.setting.base
        if self.head.reads_pixels:
            return self.head(pixels.to(base.device)).float().cpu()
        return self.logits(base.pool(base.preprocess.normalise(pixels.to(base.device))).float())

    def predict(self, pictures: Sequence[Any]) -> list[dict[str, float]]:
        """Probability of every class name for PIL pictures, the most likely first."""
        from graft.vlm.pictures import to_pixels

        pixels = torch.stack([to_pixels(picture, self.head.setting.base.preprocess) for picture in pictures])
        rows = self.logits_of_pixels(pixels).softmax(-1)
        return [{self.names[k]: float(row[k]) for k in row.argsort(descending=True).tolist()} for row in rows]

    def renamed(self, names: Sequence[str]) -> Classifier:
        """The same method for other classes, which it has never seen.

        Raises:
            InputError: what was learnt belongs to the training classes.
        """
        method, old = self.method, self.head.setting
        if method.bound or getattr(method, "class_specific", False):
            reason = "what it learnt belongs to the classes it was trained on"
            raise InputError(type(method).__name__, reason, "Use coop, cocoop, clip_adapter, prolip or clip_lora")
        head = self.head.renamed(Setting(old.base, tuple(names), old.templates), method)
        return Classifier(method, head.to(old.base.device), self.strength)

    def detach(self) -> None:
        """Leaves the base as it was."""
        self.head.detach()
