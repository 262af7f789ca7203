"""Gated LoRA: how strongly a low-rank change acts is decided by the input, for each token or each row of the batch.

Yuning Mao, Lambert Mathias, Rui Hou, Amjad Almahairi, Hao Ma, Jiawei Han, Wen-tau Yih, Madian Khabsa: UniPELT: A
Unified Framework for Parameter-Efficient Language Model Tuning, 2021, arXiv:2110.07577, section 3 (its gate of LoRA).

    y = W x + b + g(x) B A drop(x),    g(x) = mean over tokens of sigmoid(w x + v),  or of each token by itself

The gate takes the place of LoRA's scale. w starts normal (0.02), v at zero, A and B as in LoRA: rank * (in + out) + in
+ 1 parameters. It depends on the input, so it cannot be merged. Differs from the paper: ``per="token"`` is offered, as
the mean over a sequence lets a causal model see what is to come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.kernels.lora_linear import Term
from graft.studio.method import SiteMethod, check
from graft.studio.methods.lora import LowRankSlot
from graft.studio.sites import Site
from graft.studio.slot import Base, Slot


@dataclass(frozen=True)
class GatedLoRA(SiteMethod):
    """LoRA whose strength is a trained function of the input."""

    kinds = ("linear", "packed", "mha")
    when = "inputs differ in how much change they need"

    rank: int = 8
    """Inner width of the change; parameters grow in proportion."""
    per: Literal["row", "token"] = "row"
    """One gate for each row of the batch, from the mean over its tokens, or one for each token."""
    dropout: float = 0.0
    """Probability of dropping an input element of the low-rank path in training, from 0 up to but not 1."""
    targets: str | tuple[str, ...] = "attention"
    """Sites: roles (q k v o up gate down head), attention, mlp, all-linear, or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    scaling = 1.0

    def __post_init__(self) -> None:
        check(self, rank=(self.rank >= 1, "at least 1"), dropout=(0 <= self.dropout < 1, "from 0 up to but not 1"))

    def reads(self, site: Site) -> bool:
        """A weight has no input to decide by."""
        return False

    def count(self, site: Site) -> int:
        """Returns rank times both widths, and the gate's."""
        return self.rank * sum(site.covered) + site.covered[1] + 1

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns factors and gate of a site."""
        return GatedSlot(site, slots, self, module)


class GatedSlot(LowRankSlot):
    """Two factors and a gate."""

    rank_dims: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    mergeable = False

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds w and v."""
        super().extend(method, module)
        self.per = method.per
        self.w = nn.Parameter(torch.empty(self.slots, self.site.covered[1]))
        self.v = nn.Parameter(torch.empty(self.slots, 1))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws A and w, clears B and v."""
        super().reset(slot)
        self.w[slot].copy_(0.02 * torch.randn(self.w.shape[1:]))
        self.v[slot].zero_()

    def term(self, base: Base) -> Term | None:
        """Returns None: its strength depends on the input."""
        return None

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + g(x) B A drop(x)."""
        w, v, _ = self.pick(self.w, self.v)
        flat = x.reshape(w.shape[0], -1, x.shape[-1])  # (g, m, i)
        gate = torch.sigmoid(flat @ w[..., None].to(x.dtype) + v[:, None].to(x.dtype)).reshape(*x.shape[:-1], 1)
        if self.per == "row" and x.dim() > 2:
            gate = gate.mean(tuple(range(1, x.dim() - 1)), keepdim=True)
        return y + (gate * self.low_rank(x, y, self.B)).to(y.dtype)
