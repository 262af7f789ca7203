"""Compacter: bottleneck adapters whose weights are sums of Kronecker products, with one factor shared by all layers.

Rabeeh Karimi Mahabadi, James Henderson, Sebastian Ruder: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers,
2021, arXiv:2106.04647.

    u <- u + U f(D u + d) + e;    D, U = sum over k = 1 ... n of  C_k (x) (a_k b_k')

C (n, n, n) is shared by every D and U; a_k and b_k are vectors of an n-th of each width. C starts normal (``spread``),
a and b Xavier-uniform, biases at zero, so the start is very near the base: 3 (h + out) parameters for each layer with
an inside of h = out / ``reduction``, rounded up to a multiple of n, and n^3 for all. Compacter++ is
``targets="down"``. Nonlinear, so nothing merges. Differs from the paper: the base's own layer norms stay frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.bottleneck import Activation, BottleneckSlot
from graft.studio.sites import Model, Plan, Site
from graft.studio.slot import Base, Slot
from graft.studio.slots import Handle


@dataclass(frozen=True)
class Compacter(SiteMethod):
    """Serial adapters from shared and rank-one Kronecker factors."""

    kinds = ("linear", "mha")
    when = "bottleneck adapters at a hundredth of the size"

    reduction: int = 32
    """Width of a layer over that of its adapter's inside."""
    n: int = 4
    """Terms and size of the shared factors; it divides the layers' widths."""
    spread: float = 1e-4
    """Standard deviation of the shared factors at the start."""
    activation: Activation = "gelu"
    """Nonlinearity f."""
    targets: str | tuple[str, ...] = ("o", "down")
    """The output layers of sublayers: o (attention), down (feed-forward), or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        above = {name: (getattr(self, name) > 0, "above 0") for name in ("reduction", "n", "spread")}
        check(self, **above)

    def inside(self, site: Site) -> int:
        """Returns the width of an adapter's inside."""
        return self.n * max(1, -(-site.covered[0] // (self.reduction * self.n)))

    def count(self, site: Site) -> int:
        """Returns the vectors of two layers, and their biases."""
        return 3 * (self.inside(site) + site.covered[0])

    def plan(self, model: Model) -> Plan:
        """Returns the sites; the shared factors count with the first."""
        plan = super().plan(model)
        return Plan(plan.sites, (plan.counts[0] + self.n**3, *plan.counts[1:]))

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the adapter of a site."""
        if site.covered[0] % self.n:
            raise SiteError(site.key, f"its width {site.covered[0]} is no multiple of n = {self.n}", "choose another n")
        return CompactSlot(site, slots, self)

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches as every method, and gives all layers the same C."""
        handle = super().attach(model, slots, plan)
        first, *others = handle.slots_of(CompactSlot)
        for each in others:
            each.C = first.C
        return handle


class CompactSlot(BottleneckSlot):
    """An adapter of what a layer gives, its weights from small factors."""

    def __init__(self, site: Site, slots: int, method: Compacter):
        """Makes the factors."""
        self.method = method
        super().__init__(site, slots, method.inside(site), (site.covered[0], site.covered[0]), method.activation)

    def extend(self, slots: int, width: int, out: int, inside: int) -> None:
        """Makes the factors in the place of whole weights."""
        n = self.method.n
        self.C = nn.Parameter(torch.empty(slots, n, n, n))
        self.down_a, self.down_b = self._vectors(slots, width), self._vectors(slots, inside)
        self.up_a, self.up_b = self._vectors(slots, out), self._vectors(slots, width)

    def _vectors(self, slots: int, width: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(slots, self.method.n, width // self.method.n))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the factors, clears the biases."""
        self.C[slot].copy_(self.method.spread * torch.randn(self.C.shape[1:]))
        for stack in (self.down_a, self.down_b, self.up_a, self.up_b):
            # Each vector is a matrix of one row or column to Xavier's rule.
            limit = (6 / (1 + stack.shape[-1])) ** 0.5
            stack[slot].copy_(torch.empty(stack.shape[1:]).uniform_(-limit, limit))
        self.d[slot].zero_()
        self.e[slot].zero_()

    def layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the stacks D, d, U, e."""
        return self._sum(self.down_a, self.down_b), self.d, self._sum(self.up_a, self.up_b), self.e

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of C_k (x) a_k b_k', (s, n * a, n * b)."""
        return torch.einsum("skpq,ska,skb->spaqb", self.C, a, b).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + U f(D y + d) + e."""
        return self.added(y, onto=y)
