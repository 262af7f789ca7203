r"""CoOp: the words around the class name are learnt as vectors.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu: Learning to Prompt for Vision-Language Models, 2021,
arXiv:2109.01134.

    logits = s f unit(text([v_1] ... [v_M] name .))',    loss = cross entropy

f is the unit feature of a picture, s the base's logit scale. The context v is one for all classes, (M, d), or one per
class, (c, M, d). It starts at N(0, 0.02), or at the embeddings of words: from "a photo of a" the first logits are those
of the prompt "a photo of a {}.". M d parameters, or c M d.

Differs from the authors' code: vectors are float32 and trained by AdamW; pictures' features come from the store; of the
text tower runs only what depends on the context and is read (`graft.vlm.text`), with equal features and gradients; an
initial context has as many vectors as tokens, where theirs counts words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.vlm.head import Head, HeadMethod, Setting
from graft.vlm.prompts import PromptTable, context_of


@dataclass(frozen=True)
class CoOp(HeadMethod):
    """The words around the class name, learnt as vectors."""

    vectors: int = 16
    """Length of the context; with `words`, their number of tokens counts instead."""
    position: Literal["end", "middle", "front"] = "end"
    """Where the class name stands: behind, amid or before the context."""
    class_specific: bool = False
    """A context for every class: helps fine-grained classes at 8 shots and more, hurts at 1 and 2."""
    words: str = ""
    """Words that the context starts from, such as "a photo of a"; empty draws it at random."""

    default_learning_rate: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        self._check("vectors", self.vectors, 1 <= self.vectors <= 64, "1 to 64")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The context as it starts.

        Raises:
            DataError: a class name that does not fit behind it.
        """
        return Prompts(setting, self)


class Prompts(Head):
    """v."""

    def __init__(self, setting: Setting, method: CoOp):
        super().__init__(setting)
        context = start_of(setting, method.words, method.vectors)
        if method.class_specific:
            copies = len(setting.names)
            context = context.repeat(copies, 1, 1) if method.words else torch.randn(copies, *context.shape) * 0.02
        self.table = PromptTable(setting.base, setting.names, context.shape[-2], method.position)
        self.context = nn.Parameter(context)

    def classifier(self) -> Tensor:
        """Unit text features (c, e) of the context as it is."""
        own = self.context.dim() == 3
        features = self.table.features_by_class(self.context) if own else self.table.features(self.context[None])
        return F.normalize(features[0].float(), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, c) of features (b, e)."""
        return self.setting.scale * F.normalize(features, dim=-1) @ self.classifier().T


def start_of(setting: Setting, words: str, vectors: int) -> Tensor:
    """A context (m, d): the embeddings of words, or N(0, 0.02)."""
    if words:
        return context_of(setting.base, words.replace("_", " "))
    return torch.randn(vectors, setting.base.text_tower().width) * 0.02
