r"""CoCoOp: CoOp whose context is shifted by what is seen, so that it carries over to classes never seen.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu: Conditional Prompt Learning for Vision-Language Models, 2022,
arXiv:2203.05557.

    logits_i = s f unit(text([v_1 + pi(f)] ... [v_M + pi(f)] name_i .)),    pi(f) = W2 relu(W1 f + b1) + b2

f is the unit feature of the picture; W1 (e / 16, e), W2 (d, e / 16); v starts at the embeddings of "a photo of a".
M d + e (e / 16) + e / 16 + (e / 16) d + d parameters: 35,360 on ViT-B/16.

Differs from the authors' code: a whole batch is one call of the text tower, with the same logits and gradients as their
loop over pictures, and every picture's context runs once for all classes; so batches may hold more than one picture.
AdamW. With `safe`, W2 and b2 start at zero: the first step is the prompt with `words`, which a random shift, as in the
authors' code, is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.vlm.coop import start_of
from graft.vlm.head import Head, HeadMethod, Setting
from graft.vlm.prompts import PromptTable


@dataclass(frozen=True)
class CoCoOp(HeadMethod):
    """A learnt context, shifted by what is seen."""

    vectors: int = 4
    """Length of the context; with `words`, their number of tokens counts instead."""
    words: str = "a photo of a"
    """Words that the context starts from; empty draws it at random."""
    reduction: int = 16
    """Width of the feature over the inner width of the net that makes the shift."""
    safe: bool = False
    """Start without a shift, exactly at the words, instead of as in the paper."""

    default_learning_rate: ClassVar[float] = 2e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {**HeadMethod.train_defaults, "batch_size": 8}

    def __post_init__(self) -> None:
        self._check("vectors", self.vectors, 1 <= self.vectors <= 64, "1 to 64")
        self._check("reduction", self.reduction, self.reduction >= 1, "1 or more")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """Context and net as they start."""
        return ConditionalPrompts(setting, self)


class ConditionalPrompts(Head):
    """v and pi."""

    def __init__(self, setting: Setting, method: CoCoOp):
        super().__init__(setting)
        context, width = start_of(setting, method.words, method.vectors), setting.weights.shape[1]
        inner = max(1, width // method.reduction)
        self.table = PromptTable(setting.base, setting.names, len(context))
        self.context = nn.Parameter(context)
        self.meta = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, context.shape[1]))
        if method.safe:
            for tensor in self.meta[2].parameters():
                nn.init.zeros_(tensor)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, c) of features (b, e)."""
        if torch.is_grad_enabled():
            return self._logits(features)
        return torch.cat([self._logits(part) for part in features.split(16)])

    def _logits(self, features: Tensor) -> Tensor:
        features = F.normalize(features, dim=-1)
        context = self.context + self.meta(features)[:, None]  # (b, m, d)
        texts = F.normalize(self.table.features(context).float(), dim=-1)  # (b, c, e)
        return self.setting.scale * (texts @ features[..., None])[..., 0]
