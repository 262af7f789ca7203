"""BitFit: of the whole model only the biases are trained.

Elad Ben Zaken, Shauli Ravfogel, Yoav Goldberg: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models, 2021, arXiv:2106.10199.

    y = W x + (b + d),    and likewise in norms

The change d starts at zero: out parameters for each layer that has a bias. Trained is the change and not the bias
itself, which is the same to an optimiser without weight decay, and lets the base stay frozen and rows of a batch
differ. The paper's smaller set is ``targets=("q", "up")``. It trains the classifier too, which is the caller's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.studio.method import SiteMethod
from graft.studio.sites import Model, Plan, Site, channel_dim, plan_biases
from graft.studio.slot import Base, Slot, spread


@dataclass(frozen=True)
class BitFit(SiteMethod):
    """Trained biases, in a model that has some."""

    kinds = ("bias",)
    when = "a strong, tiny baseline for encoders; recent language models have no biases"

    targets: str | tuple[str, ...] = "everything"
    """Layers: everything (but heads), norm, all, all-linear, roles (q k v o up gate down), or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def sites(self, model: Model) -> Plan:
        """Returns the biases of the layers that the targets name."""
        return plan_biases(model, self.targets, self.towers)

    def count(self, site: Site) -> int:
        """Returns one for each output."""
        return site.covered[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the change of a bias."""
        return BiasSlot(site, slots, module)


class BiasSlot(Slot):
    """The change of a bias."""

    def __init__(self, site: Site, slots: int, module: nn.Module):
        """Makes a change of zero; ``module`` tells which dimension the channels are."""
        super().__init__(site, slots)
        self.dim = channel_dim(module)
        self.d = nn.Parameter(torch.zeros(slots, site.covered[0]))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Sets the change to zero."""
        self.d[slot].zero_()

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + d."""
        change, strength = self.pick(self.d)
        return y + spread(strength[:, None] * change, y, self.dim)

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns the bias with its change."""
        assert now.bias is not None
        return now._replace(bias=now.bias + self.scale[slot] * self.d[slot])
