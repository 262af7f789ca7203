"""Bottleneck adapters: small feed-forward layers put behind, or beside, the sublayers of a frozen transformer.

Serial: Neil Houlsby, Andrei Giurgiu, Stanislaw Jastrzebski, Bruna Morrone, Quentin de Laroussilhe, Andrea Gesmundo,
Mona Attariyan, Sylvain Gelly: Parameter-Efficient Transfer Learning for NLP, 2019, arXiv:1902.00751 (behind attention
and feed-forward); Jonas Pfeiffer, Aishwarya Kamath, Andreas Rueckle, Kyunghyun Cho, Iryna Gurevych: AdapterFusion:
Non-Destructive Task Composition for Transfer Learning, 2020, arXiv:2005.00247 (behind feed-forward only). Parallel:
Junxian He, Chunting Zhou, Xuezhe Ma, Taylor Berg-Kirkpatrick, Graham Neubig: Towards a Unified View of
Parameter-Efficient Transfer Learning, 2021, arXiv:2110.04366.

    serial:  u <- u + U f(D u + d) + e;    parallel:  Sub(x) <- Sub(x) + s (U f(D x + d) + e)

u is what a sublayer's last projection gives (sites: its output layer), before it joins the residual; x is what the
sublayer is given (sites: the whole sublayer). Serial weights start normal (0.01, cut at two deviations) and biases at
zero, near the base; parallel D starts as LoRA's A and U at zero, at the base. Parameters: h (in + out) + h + out for an
inside of h. Nonlinear, so nothing merges. Differs from the papers: the base's own layer norms stay frozen (Houlsby
trains them: add ssf or bitfit on ``norm``); x is read behind a pre-norm where the model has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.kernels.bottleneck import Layers, bottleneck
from graft.studio.method import SiteMethod, check
from graft.studio.sites import Model, Plan, Site, plan_blocks
from graft.studio.slot import Base, Slot, first_tensor

Activation = Literal["relu", "gelu", "silu"]


@dataclass(frozen=True)
class Houlsby(SiteMethod):
    """Serial adapters behind attention and feed-forward."""

    kinds = ("linear", "mha")
    when = "much room to learn; every token pays at inference"

    width: int = 64
    """Inside of an adapter, h."""
    activation: Activation = "gelu"
    """Nonlinearity f."""
    targets: str | tuple[str, ...] = ("o", "down")
    """The output layers of sublayers: o (attention), down (feed-forward), or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(self, width=(self.width >= 1, "at least 1"))

    def count(self, site: Site) -> int:
        """Returns both layers' weights and biases."""
        out = site.covered[0]
        return self.width * 2 * out + self.width + out

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the adapter of a site."""
        return SerialSlot(site, slots, self.width, (site.covered[0], site.covered[0]), self.activation)


@dataclass(frozen=True)
class Pfeiffer(Houlsby):
    """Serial adapters behind feed-forward only."""

    when = "half of Houlsby's cost, most of its effect"

    activation: Activation = "relu"
    """Nonlinearity f."""
    targets: str | tuple[str, ...] = "down"
    """The output layers of sublayers: o (attention), down (feed-forward), or patterns of paths."""


@dataclass(frozen=True)
class Parallel(SiteMethod):
    """Adapters beside the feed-forward sublayers, scaled."""

    kinds = ("block",)
    when = "the strongest bottleneck at equal size; AdaptFormer is this on a ViT"

    width: int = 64
    """Inside of an adapter, h; the paper takes 512 for a width of 1024."""
    scale: float = 4.0
    """Factor s of what it adds."""
    activation: Activation = "relu"
    """Nonlinearity f."""
    targets: str | tuple[str, ...] = "mlp"
    """Sublayers: mlp, attention, or both."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(self, width=(self.width >= 1, "at least 1"), scale=(self.scale > 0, "above 0"))

    def sites(self, model: Model) -> Plan:
        """Returns the sublayers."""
        return plan_blocks(model, self.targets, self.towers)

    def count(self, site: Site) -> int:
        """Returns both layers' weights and biases."""
        return self.width * sum(site.shape) + self.width + site.shape[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the adapter of a sublayer."""
        return ParallelSlot(site, slots, self.width, (site.shape[0], site.shape[1]), self.activation, self.scale)


class BottleneckSlot(Slot):
    """Two small layers with a nonlinearity between them."""

    mergeable = False

    def __init__(
        self, site: Site, slots: int, width: int, shape: tuple[int, int], activation: str, scaling: float = 1.0
    ):
        """Makes layers (in -> width -> out) for shape (out, in)."""
        super().__init__(site, slots, scaling)
        self.activation = activation
        out, inside = shape
        self.d, self.e = nn.Parameter(torch.empty(slots, width)), nn.Parameter(torch.empty(slots, out))
        self.extend(slots, width, out, inside)
        for slot in range(slots):
            self.reset(slot)

    def extend(self, slots: int, width: int, out: int, inside: int) -> None:
        """Makes the weights, before the first `reset`."""
        self.D = nn.Parameter(torch.empty(slots, width, inside))
        self.U = nn.Parameter(torch.empty(slots, out, width))

    def layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the stacks D, d, U, e."""
        return self.D, self.d, self.U, self.e

    def added(self, x: Tensor, onto: Tensor) -> Tensor:
        """Returns onto + s (U f(D x + d) + e) for x (b, ..., i) and onto (b, ..., o)."""
        return bottleneck(x, Layers(*self.layers(), self.scale, self.route), self.activation, onto=onto)


class SerialSlot(BottleneckSlot):
    """An adapter of what a layer gives."""

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the weights truncated normal, clears the biases."""
        for stack in (self.D, self.U):
            stack[slot].copy_(nn.init.trunc_normal_(torch.empty(stack.shape[1:]), std=0.01, a=-0.02, b=0.02))
        self.d[slot].zero_()
        self.e[slot].zero_()

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + U f(D y + d) + e."""
        return self.added(y, onto=y)


class ParallelSlot(BottleneckSlot):
    """An adapter of what a sublayer is given."""

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws D, clears the rest."""
        self.D[slot].copy_(nn.init.kaiming_uniform_(torch.empty(self.D.shape[1:]), a=sqrt(5)))
        for stack in (self.d, self.U, self.e):
            stack[slot].zero_()

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the sublayer's output, or its tuple, with the addition."""
        x, out = first_tensor(args, kwargs), call(*args, **kwargs)
        return (self.added(x, out[0]), *out[1:]) if isinstance(out, tuple) else self.added(x, out)
