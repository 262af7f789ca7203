"""SoRA: LoRA with a gate on each rank, which a proximal step drives to exactly zero where the rank is not needed.

Ning Ding, Xingtai Lv, Qiaosen Wang, Yulin Chen, Bowen Zhou, Zhiyuan Liu, Maosong Sun: Sparse Low-rank Adaptation of
Pre-trained Language Models, 2023, arXiv:2311.11696.

    y = W x + b + s B (g * A drop(x));    after each step of the optimiser  g <- sign(g) max(|g| - threshold, 0)

g starts normal, A and B as in LoRA: rank * (in + out + 1) parameters. As in the authors' code the threshold is not
multiplied by the learning rate. Ranks whose gate is zero take no part; the result folds into a LoRA without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.studio.method import check
from graft.studio.methods.lora import ConvSlot, LoRA, LowRankSlot
from graft.studio.sites import Site
from graft.studio.slot import Base, Slot
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class SoRA(LoRA):
    """LoRA that finds each layer's rank by sparse gates."""

    kinds = ("linear", "packed", "mha", "conv")
    when = "the rank is not known and may differ between layers"

    alpha: float = 16.0
    """Numerator of the scale; raise it with the rank to keep the scale."""
    threshold: float = 3e-4
    """How far a gate moves towards zero after each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, threshold=(self.threshold >= 0, "0 or more"))

    def count(self, site: Site) -> int:
        """Returns LoRA's, and a gate for each rank."""
        return super().count(site) + self.rank

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns factors and gates of a site."""
        return (SparseConvSlot if site.kind == "conv" else SparseSlot)(site, slots, self, module)

    @torch.no_grad()
    def after_step(self, handle: Handle, step: int, steps: int) -> None:
        """Takes the proximal step of the gates."""
        for name, gate in handle.bank.named_parameters():
            if name.endswith(".g"):
                gate.copy_(nn.functional.softshrink(gate, self.threshold))

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Returns B g and A; gates of zero leave columns of zero."""
        tensors = dict(adapter.tensors)
        for name in [name for name in tensors if name.endswith(".g")]:
            gate, key = tensors.pop(name), f"{name.removesuffix('g')}B"
            tensors[key] = tensors[key] * gate
        return replace(adapter, tensors=tensors)


class SparseSlot(LowRankSlot):
    """Two factors and a gate for each rank."""

    rank_dims: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "g": 0}

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds g."""
        super().extend(method, module)
        self.g = nn.Parameter(torch.empty(self.slots, method.rank))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws A and g, clears B."""
        super().reset(slot)
        self.g[slot].copy_(torch.randn(self.g.shape[1:]))

    def up(self, base: Base) -> Tensor:
        """Returns B with its columns gated."""
        return self.B * self.g[:, None]


class SparseConvSlot(SparseSlot, ConvSlot):
    """The same on a convolution."""
