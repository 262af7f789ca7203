"""LLaMA-Adapter with pictures: what the image tower sees is added to the prompts of all adapted layers.

Renrui Zhang, Jiaming Han, Chris Liu, Peng Gao, Aojun Zhou, Xiangfei Hu, Shilin Yan, Pan Lu, Hongsheng Li, Yu Qiao:
LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, 2023, arXiv:2303.16199, its section on
multi-modal reasoning.

    I = U gelu(D [I_1; ...; I_M] + e) + u,    P_l <- P_l + I in every row of the prompt of each adapted layer l

I_1 ... I_M are the tower's global features (its class token, or the mean of a tower without one) after ``levels`` of
its blocks, evenly spaced up to the one whose features the language model gets; D (hidden, M c), U (d, hidden). Rows
without a picture have the prompts alone, those with several the mean. All else is `graft.llm_mm.llama_adapter`.

The authors published neither the projection's form nor the recipe: its hidden layer is our choice. The pictures also
stand among the words, where the base puts them; the gates, shut at the start, leave the base as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.sight import AddedPrompt, Ear, PictureSlot, connect, plan_eyes
from graft.studio.method import check
from graft.studio.sites import Model, Plan, Site
from graft.studio.slot import Slot
from graft.studio.slots import Handle


@dataclass(frozen=True)
class MultimodalLlamaAdapter(LlamaAdapter):
    """Gated prompts that the picture is added to."""

    kinds: ClassVar[tuple[str, ...]] = ("kv", "block")
    when: ClassVar[str] = "answers that depend on the whole picture, at the size of LLaMA-Adapter"

    levels: int = 4
    """Blocks of the image tower whose global features are taken; fewer where it has fewer."""
    hidden: int = 64
    """Inside of the network from these features to the prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, levels=(self.levels >= 1, "at least 1"), hidden=(self.hidden >= 1, "at least 1"))

    def sites(self, model: Model) -> Plan:
        """Returns the part that sees, of shape (features, width of the language model), its tower, and attentions."""
        eyes, tower = plan_eyes(model)
        features = len(self.blocks(tower)) * eyes.shape[0]
        return Plan((replace(eyes, shape=(features, eyes.shape[1])), tower, *super().sites(model)))

    def blocks(self, tower: Site) -> tuple[int, ...]:
        """Returns the tower's blocks whose features are taken, counted from 1."""
        last = tower.shape[0]
        count = min(self.levels, last)
        return tuple(round((k + 1) * last / count) for k in range(count))

    def count(self, site: Site) -> int:
        """Returns the numbers of the network, or of a prompt and its gates; nothing for the tower."""
        if site.kind == "kv":
            return super().count(site)
        features, width = site.shape
        return 0 if site.role == "tower" else self.hidden * (features + 1) + width * (self.hidden + 1)

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the network, an ear at the tower, or the prompt of an attention."""
        if site.kind == "kv":
            return AddedPrompt(site, slots, self.num_tokens, module)
        if site.role == "tower":
            return Ear(site, slots, self.blocks(site))
        features, width = site.shape
        return PictureSlot(site, slots, lambda: Projection(features, width, self.hidden), whole=False)

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches as every method; all slots look at the same pictures."""
        handle = super().attach(model, slots, plan)
        connect(handle)
        return handle


class Projection(nn.Module):
    """Two layers from a picture's features to one row of a prompt."""

    def __init__(self, features: int, width: int, hidden: int):
        super().__init__()
        self.down, self.up = nn.Linear(features, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(m, features) -> (m, 1, d)."""
        y: Tensor = self.up(torch.nn.functional.gelu(self.down(x)))
        return y[:, None]
