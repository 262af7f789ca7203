r"""TaskRes: a trained residual on every class's text feature.

Tao Yu, Zhihe Lu, Xin Jin, Zhibo Chen, Xinchao Wang: Task Residual for Tuning Vision-Language Models, 2022,
arXiv:2211.10277.

    logits = s f unit(W + alpha R)'

W (c, e) are the zero-shot weights, R (c, e) starts at zero, f is the unit feature of a picture. c e parameters.
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
class TaskRes(HeadMethod):
    """A trained residual on every class's text feature."""

    alpha: float = 0.5
    """Factor of the residual; 1 in the paper for flowers."""

    default_learning_rate: ClassVar[float] = 2e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {**HeadMethod.train_defaults, "batch_size": 256}
    bound: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check("alpha", self.alpha, self.alpha > 0, "above 0")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The residual at zero."""
        return Residual(setting, self.alpha)


class Residual(Head):
    """R."""

    def __init__(self, setting: Setting, alpha: float):
        super().__init__(setting)
        self.alpha, self.residual = alpha, nn.Parameter(torch.zeros_like(setting.weights))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, c) of features (b, e)."""
        weights = F.normalize(self.setting.weights + self.alpha * self.residual, dim=-1)
        return self.setting.scale * F.normalize(features, dim=-1) @ weights.T
