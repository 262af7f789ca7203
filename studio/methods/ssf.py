"""SSF: the output of every operation is scaled and shifted, channel by channel.

Dongze Lian, Daquan Zhou, Jiashi Feng, Xinchao Wang: Scaling & Shifting Your Features: A New Baseline for Efficient
Model Tuning, 2022, arXiv:2210.08823.

    y' = gamma * y + beta

after linear layers, convolutions and norms, heads left out. gamma starts normal around 1, beta around 0, both with
deviation ``spread`` (0.02, as in the authors' code; so the start is near the base, not at it): 2 out parameters. It
merges into weight and bias. A norm that has no bias (RMSNorm) keeps it attached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.studio.method import SiteMethod, check
from graft.studio.sites import Site, channel_dim
from graft.studio.slot import Base, Slot, spread

# Norms whose output is weight * x + bias; others (Gemma's) have their own idea of a weight.
_PLAIN_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class SSF(SiteMethod):
    """Trained scale and shift after every operation."""

    kinds = ("linear", "packed", "mha", "conv", "norm")
    when = "vision backbones; no cost once merged"

    spread: float = 0.02
    """Standard deviation of the start around the identity; 0 starts exactly there."""
    targets: str | tuple[str, ...] = "everything"
    """Sites: everything (but heads), norm, all, all-linear, roles (q k v o up gate down head), or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(self, spread=(self.spread >= 0, "0 or more"))

    def count(self, site: Site) -> int:
        """Returns two for each channel."""
        return 2 * site.covered[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns scale and shift of a site."""
        return ScaleShift(site, slots, self.spread, module)


class ScaleShift(Slot):
    """Scale and shift of a layer's output."""

    def __init__(self, site: Site, slots: int, spread: float, module: nn.Module):
        """Makes both; ``module`` tells which dimension the channels are."""
        super().__init__(site, slots)
        self.spread, self.dim = spread, channel_dim(module)
        self.mergeable = site.kind != "norm" or (isinstance(module, _PLAIN_NORMS) and module.bias is not None)
        self.gamma = nn.Parameter(torch.empty(slots, site.covered[0]))
        self.beta = nn.Parameter(torch.empty(slots, site.covered[0]))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws both around the identity."""
        self.gamma[slot].copy_(1 + self.spread * torch.randn(self.gamma.shape[1:]))
        self.beta[slot].copy_(self.spread * torch.randn(self.beta.shape[1:]))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns gamma * y + beta, blended with y by the strength."""
        gamma, beta, strength = self.pick(self.gamma, self.beta)
        strength = strength[:, None]
        scale, shift = 1 + strength * (gamma - 1), strength * beta
        return y * spread(scale, y, self.dim) + spread(shift, y, self.dim)

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns the rows scaled and the bias shifted; a layer without a bias gets one."""
        assert now.weight is not None
        scale = 1 + self.scale[slot] * (self.gamma[slot] - 1)
        shift = self.scale[slot] * self.beta[slot]
        weight = now.weight * scale.view(-1, *[1] * (now.weight.dim() - 1))
        return Base(weight, shift if now.bias is None else now.bias * scale + shift)
