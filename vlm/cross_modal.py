r"""Cross-modal linear probe: a linear classifier for which class names are further training samples.

Zhiqiu Lin, Samuel Yu, Zhiyi Kuang, Deepak Pathak, Deva Ramanan: Multimodality Helps Unimodality: Cross-Modal Few-Shot
Learning with Multimodal Models, 2023, arXiv:2301.06267.

    loss = (CE(s f V', y) + CE(s t V', c)) / 2

V (c, e) starts at the zero-shot weights and is not held at unit length; f are unit features of pictures with labels y,
t those of prompts of class c. Half of what a step sees are pictures, half are texts. c e parameters.

Differs from the authors' code: every prompt of every class is in every step, instead of a draw of as many as pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.vlm.head import Head, HeadMethod, Setting


@dataclass(frozen=True)
class CrossModal(HeadMethod):
    """A linear classifier that learns from pictures and from class names."""

    texts: float = 0.5
    """Share of the loss that the class names have."""

    default_learning_rate: ClassVar[float] = 1e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {**HeadMethod.train_defaults, "batch_size": 256, "weight_decay": 0.01}
    bound: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check("texts", self.texts, 0 <= self.texts < 1, "0 up to but not 1")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The zero-shot weights."""
        return Probe(setting, self.texts)


class Probe(Head):
    """V."""

    def __init__(self, setting: Setting, texts: float):
        super().__init__(setting)
        self.texts, self.weight = texts, nn.Parameter(setting.weights.clone())

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, c) of features (b, e)."""
        return self.setting.scale * F.normalize(features, dim=-1) @ self.weight.T

    def loss(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The two cross entropies, weighted."""
        logits, prompts = self(inputs), self.setting.prompts
        told = self.setting.scale * prompts.flatten(0, 1) @ self.weight.T
        classes = torch.arange(prompts.shape[1], device=told.device).repeat(prompts.shape[0])
        loss = (1 - self.texts) * F.cross_entropy(logits, labels) + self.texts * F.cross_entropy(told, classes)
        return loss, logits
