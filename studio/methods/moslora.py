"""MoSLoRA: LoRA with a trained mixer between its factors, so that every subspace of A can feed every one of B.

Taiqiang Wu, Jiahao Wang, Zhe Zhao, Ngai Wong: Mixture-of-Subspaces in Low-Rank Adaptation, 2024, arXiv:2406.11909.

    y = W x + b + s B M A drop(x),    s = alpha / rank

M (rank, rank) and A start Kaiming-uniform (a = sqrt 5), as in the authors' code, B at zero: rank * (in + out + rank)
parameters. M folds into A, so other libraries read the result as a LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.studio.methods.lora import ConvSlot, LoRA, LowRankSlot
from graft.studio.sites import Site
from graft.studio.slot import Base, Slot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class MoSLoRA(LoRA):
    """LoRA with a trained square mixer between its factors."""

    kinds = ("linear", "packed", "mha", "conv")
    when = "LoRA, a little stronger at the same rank"

    def count(self, site: Site) -> int:
        """Returns LoRA's, and the mixer's."""
        return super().count(site) + self.rank**2

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        return (MixedConvSlot if site.kind == "conv" else MixedSlot)(site, slots, self, module)

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Returns B and M A."""
        tensors = dict(adapter.tensors)
        for name in [name for name in tensors if name.endswith(".M")]:
            mixer, key = tensors.pop(name), f"{name.removesuffix('M')}A"
            tensors[key] = (mixer @ tensors[key].flatten(1)).view(tensors[key].shape)
        return replace(adapter, tensors=tensors)


class MixedSlot(LowRankSlot):
    """Two factors and a mixer."""

    rank_dims: ClassVar[Mapping[str, int]] = {}

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds M."""
        super().extend(method, module)
        self.M = nn.Parameter(torch.empty(self.slots, method.rank, method.rank))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws A and M, clears B."""
        super().reset(slot)
        first = torch.empty(self.M.shape[1:])
        nn.init.kaiming_uniform_(first, a=sqrt(5))
        self.M[slot].copy_(first)

    def up(self, base: Base) -> Tensor:
        """Returns B M."""
        return self.B @ self.M


class MixedConvSlot(MixedSlot, ConvSlot):
    """The same on a convolution."""
