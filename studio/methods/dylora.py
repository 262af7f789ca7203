"""DyLoRA: LoRA trained at a rank drawn anew for each step, so that the result works at every rank up to the largest.

Mojtaba Valipour, Mehdi Rezagholizadeh, Ivan Kobyzev, Ali Ghodsi: DyLoRA: Parameter Efficient Tuning of Pre-trained
Models using Dynamic Search-Free Low-Rank Adaptation, 2022, arXiv:2210.07558.

    y = W x + b + (alpha / r) B[:, :r] A[:r] drop(x),    r uniform on 1 ... rank in training, ``deploy`` after it

A and B start as in LoRA: rank * (in + out) parameters. With ``frozen`` only row r of A and column r of B get a gradient
in a step (the paper's faster variant), else all up to r. Differs from the authors' code: one draw of r for each step is
made by `before_step`, for all layers; without it the largest rank is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.kernels.lora_linear import Term
from graft.studio.config import from_dict
from graft.studio.method import check
from graft.studio.methods.lora import LoRA, LowRankSlot
from graft.studio.sites import Site
from graft.studio.slot import Base, Slot
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class DyLoRA(LoRA):
    """LoRA that can be cut to any smaller rank after training."""

    kinds = ("linear", "packed", "mha")
    when = "one training for devices of different size"

    frozen: bool = False
    """Train only the row and the column of the rank that was drawn."""
    deploy: int | None = None
    """Rank used outside of training; none is the largest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, deploy=(self.deploy is None or 1 <= self.deploy <= self.rank, "from 1 to the rank"))

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        return NestedSlot(site, slots, self, module)

    def before_step(self, handle: Handle, step: int, steps: int) -> None:
        """Draws the rank of the step from torch's global generator."""
        drawn = int(torch.randint(1, self.rank + 1, ()))
        for slot in handle.slots_of(NestedSlot):
            slot.drawn.fill_(drawn)

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Returns the factors cut to the rank to deploy, with their scale."""
        method = from_dict(cls, adapter.card.config, "adapter.json")
        rank = method.deploy or method.rank
        tensors = {
            name: tensor[:rank] if name.endswith(".A") else tensor[:, :rank] for name, tensor in adapter.tensors.items()
        }
        card = replace(adapter.card, config={**adapter.card.config, "rank": rank})
        return replace(adapter, tensors=tensors, card=card)


class NestedSlot(LowRankSlot):
    """Factors of which the first ranks are used."""

    drawn: Tensor
    ranks: Tensor

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds the rank of the step."""
        super().extend(method, module)
        self.method, self.scaling = method, 1.0
        self.scale.fill_(1.0)
        self.register_buffer("drawn", torch.tensor(method.rank), persistent=False)
        self.register_buffer("ranks", torch.arange(1, method.rank + 1), persistent=False)

    def up(self, base: Base) -> Tensor:
        """Returns alpha / r B with the columns past r at zero; in training with gradients where the step has them."""
        if not self.training:
            return self.cut(torch.full_like(self.drawn, self.method.deploy or self.method.rank), self.B)
        up = torch.where(self.ranks == self.drawn, self.B, self.B.detach()) if self.method.frozen else self.B
        return self.cut(self.drawn, up)

    def cut(self, rank: Tensor, up: Tensor) -> Tensor:
        """Returns alpha / r B without the columns past a rank."""
        return up * (self.ranks <= rank) * (self.method.alpha / (rank.sqrt() if self.method.rslora else rank))

    def delta(self, slot: int) -> Tensor:
        """Returns the change at the rank to deploy."""
        up = self.cut(torch.full_like(self.drawn, self.method.deploy or self.method.rank), self.B)[slot]
        return self.scale[slot] * up @ self.A[slot]

    def fused(self, up: Tensor) -> Term:
        """Returns the term, with a gradient of A only where the step has one."""
        term = super().fused(up)
        if not (self.training and self.method.frozen):
            return term
        return term._replace(down=torch.where((self.ranks == self.drawn)[:, None], self.A, self.A.detach()))
