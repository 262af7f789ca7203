r"""CLIP-Adapter: a bottleneck on the image feature, mixed with the feature itself.

Peng Gao, Shijie Geng, Renrui Zhang, Teli Ma, Rongyao Fang, Yongfeng Zhang, Hongsheng Li, Yu Qiao: CLIP-Adapter: Better
Vision-Language Models with Feature Adapters, 2021, arXiv:2110.04544.

    f' = ratio A(f) + (1 - ratio) f,    A(f) = relu(W2 relu(W1 f)),    logits = s unit(f') W'

f is the projected feature, *not* at unit length; W1 (e / reduction, e), W2 (e, e / reduction), no biases; W the
zero-shot weights. 2 e^2 / reduction parameters.

Differs from the authors' code: text features are computed once; AdamW. With `safe`, W2 starts at zero, nothing follows
it and f is kept whole, f' = f + ratio W2 relu(W1 f): then the first step is zero-shot, which the paper's is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.vlm.head import Head, HeadMethod, Setting


@dataclass(frozen=True)
class ClipAdapter(HeadMethod):
    """A bottleneck on the image feature, mixed with the feature itself."""

    ratio: float = 0.2
    """Share of the bottleneck's output; 0.2 for general classes, 0.6 for fine-grained ones in the paper."""
    reduction: int = 4
    """Width of the feature over that of the bottleneck."""
    safe: bool = False
    """Start exactly at zero-shot instead of as in the paper."""

    default_learning_rate: ClassVar[float] = 1e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {**HeadMethod.train_defaults, "batch_size": 256}

    def __post_init__(self) -> None:
        self._check("ratio", self.ratio, 0 < self.ratio <= 1, "above 0, up to 1")
        self._check("reduction", self.reduction, self.reduction >= 1, "1 or more")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The bottleneck as it starts."""
        return Bottleneck(setting, self)


class Bottleneck(Head):
    """The two matrices."""

    def __init__(self, setting: Setting, method: ClipAdapter):
        super().__init__(setting)
        width = setting.weights.shape[1]
        self.method = method
        self.down = nn.Linear(width, max(1, width // method.reduction), bias=False)
        self.up = nn.Linear(self.down.out_features, width, bias=False)
        if method.safe:
            nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, c) of features (b, e)."""
        change, ratio = self.up(torch.relu(self.down(features))), self.method.ratio
        if self.method.safe:
            return self.setting.zero_shot(features + ratio * change)
        return self.setting.zero_shot(ratio * torch.relu(change) + (1 - ratio) * features)
