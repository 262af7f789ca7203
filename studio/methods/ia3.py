"""(IA)3: keys, values and the inside of the feed-forward layer are multiplied by trained vectors.

Haokun Liu, Derek Tam, Mohammed Muqeeth, Jay Mohta, Tenghao Huang, Mohit Bansal, Colin Raffel: Few-Shot Parameter-
Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022, arXiv:2205.05638.

    y = l * (W x + b)  at k, v (targets);    y = W (l * x) + b  at down (inputs)

l starts at one: out parameters for each of the first, in for each of the second. It merges into the rows (with the
bias) or the columns of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod
from graft.studio.sites import Model, Plan, Site, channel_dim, matches, plan_sites
from graft.studio.slot import Base, Slot, spread

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class IA3(SiteMethod):
    """Trained factors on keys, values and the feed-forward layer's inside."""

    kinds = ("linear", "packed", "mha", "conv")
    when = "a handful of examples, thousands of adapters"

    targets: str | tuple[str, ...] = ("k", "v")
    """Sites whose output is scaled: roles (q k v o up gate down), attention, mlp, or patterns of paths."""
    inputs: tuple[str, ...] = ("down",)
    """Sites whose input is scaled, as `targets`."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def sites(self, model: Model) -> Plan:
        """Returns the sites of both, each once."""
        wanted = (self.targets,) if isinstance(self.targets, str) else self.targets
        return plan_sites(model, (*wanted, *self.inputs), self.kinds, towers=self.towers)

    def inside(self, site: Site) -> bool:
        """Whether it is the site's input that is scaled."""
        return any(matches(target, site) for target in self.inputs)

    def count(self, site: Site) -> int:
        """Returns the width of what is scaled."""
        return site.shape[1] if self.inside(site) else site.covered[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        if self.inside(site) and site.rows is not None:
            raise SiteError(site.key, "the rows of a projection share one input", "name it in targets")
        return (InputScale if self.inside(site) else OutputScale)(site, slots, self.count(site), channel_dim(module))

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for peft."""
        from graft.studio.formats import ia3

        return ia3.export(adapter, folder) if format == "peft" else super().export(adapter, folder, format)


class OutputScale(Slot):
    """Factors of a layer's output."""

    def __init__(self, site: Site, slots: int, width: int, dim: int):
        """Makes factors of one for the channels at ``dim``."""
        super().__init__(site, slots)
        self.dim = dim
        self.l = nn.Parameter(torch.ones(slots, width))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Sets the factors to one."""
        self.l[slot].fill_(1.0)

    def factor(self, like: Tensor) -> Tensor:
        """Returns 1 + strength (l - 1) in the shape of the channels of ``like``."""
        factor, strength = self.pick(self.l)
        return spread(1 + strength[:, None] * (factor - 1), like, self.dim)

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns l * y."""
        return y * self.factor(y)

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns W and b with their rows scaled."""
        assert now.weight is not None
        factor = 1 + self.scale[slot] * (self.l[slot] - 1)
        weight = now.weight * factor.view(-1, *[1] * (now.weight.dim() - 1))
        return Base(weight, None if now.bias is None else now.bias * factor)


class InputScale(OutputScale):
    """Factors of a layer's input."""

    def enter(self, x: Tensor) -> Tensor:
        """Returns l * x."""
        return x * self.factor(x)

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y, which has seen the scaled input."""
        return y

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns W with its columns scaled."""
        assert now.weight is not None
        factor = 1 + self.scale[slot] * (self.l[slot] - 1)
        return now._replace(weight=now.weight * factor.view(1, -1, *[1] * (now.weight.dim() - 2)))
