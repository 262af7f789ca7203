"""FishMask: of all weights only those that the data's Fisher information points out are trained.

Yi-Lin Sung, Varun Nair, Colin Raffel: Training Neural Networks with Fixed Sparse Masks, 2021, arXiv:2111.09839.

    W <- W + mask * D,    mask = the largest of F over all layers,    F = mean over samples of (d log p(y | x) / d W)^2

The mask is chosen once, from the losses of about 1024 samples (empirical Fisher), and stays. Trained are the changes at
its places, from zero: ``density`` times the weights and biases of the sites; the adapter file holds these and their
places. The layers use the changed weight itself, so a batch has one adapter. Differs from the authors' code: token
tables and heads are left out, as a tied table is two layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.errors import InputError, SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.sites import (
    Model,
    Plan,
    Site,
    channel_dim,
    is_dense,
    named_modules,
    plan_parameters,
    told,
    weight_names,
)
from graft.studio.slot import Base, Slot, spread
from graft.studio.slots import Handle, attach


@dataclass(frozen=True)
class FishMask(SiteMethod):
    """The weights that matter most to the data, trained in place."""

    kinds = ("linear", "mha", "conv", "norm", "bias")
    when = "a small file, no new layers, and a look at the data first"

    density: float = 0.005
    """Share of the weights that is trained, above 0 and at most 1."""
    targets: str | tuple[str, ...] = "everything"
    """Layers: everything (but heads), norm, all, all-linear, roles (o up gate down), or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(self, density=(0 < self.density <= 1, "above 0 and at most 1"))

    def sites(self, model: Model) -> Plan:
        """Returns the weights and biases to choose from."""
        return plan_parameters(model, self.targets, self.kinds, self.towers)

    def plan(self, model: Model) -> Plan:
        """Returns the sites with their share if all were alike; what is chosen differs, the sum does not."""
        sites = self.sites(model).sites
        ends = [round(self.density * total) for total in accumulate(prod(site.covered) for site in sites)]
        return Plan(sites, tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)))

    def choose(self, model: Model, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """Returns the places to train in each site, as flat indices.

        Args:
            model: the model or its components; its ``requires_grad`` flags are as before at the end.
            losses: negative log-likelihoods of one sample each, computed as they are asked for (a generator), so that
                the weights can have gradients.

        Raises:
            InputError: no losses, or losses that were computed before.
            SiteError: a weight that is quantised or sharded.
        """
        plan, modules = self.sites(model), named_modules(model)
        names = {site: f"{site.name}.bias" if site.kind == "bias" else site.name for site in plan}
        whole: dict[str, Any] = {
            name: modules[site.name]._parameters[weight_names(modules[site.name])[site.kind == "bias"]]
            for site, name in names.items()
        }
        found = fisher(whole, losses, "use lora, or other targets")
        return largest({site.key: found[names[site]][slice(*(site.rows or (None,)))] for site in plan}, self.density)

    def attach(
        self,
        model: Model,
        slots: int = 1,
        plan: Plan | None = None,
        places: Mapping[str, Tensor] | None = None,
    ) -> Handle:
        """Attaches to the sites in which `choose` found places.

        Raises:
            InputError: no places.
        """
        if not places:
            raise InputError("FishMask without places", "it trains what choose() found", "give places = choose(...)")
        return attach_at(model, plan or self.sites(model), places, slots)

    def attach_trained(self, model: Model, plan: Plan, tensors: Mapping[str, Tensor]) -> Handle:
        """Attaches at the places that the adapter brings."""
        return attach_at(model, plan, places_in(tensors))


def largest(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Returns where the largest scores of all sites together are, as flat indices in each site that has some."""
    flat = torch.cat([each.flatten() for each in scores.values()])
    best = flat.topk(max(1, round(density * len(flat)))).indices.sort().values
    ends = torch.tensor([each.numel() for each in scores.values()], device=best.device).cumsum(0)
    parts = torch.tensor_split(best, torch.searchsorted(best, ends)[:-1].cpu())
    starts = [0, *ends.tolist()]
    return {key: part - start for key, part, start in zip(scores, parts, starts, strict=False) if len(part)}


def places_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the places that a trained adapter changes, by site."""
    return {name.removesuffix(".places"): each for name, each in tensors.items() if name.endswith(".places")}


def attach_at(model: Model, plan: Plan, places: Mapping[str, Tensor], slots: int = 1) -> Handle:
    """Attaches trainable changes at some places of the planned sites; sites without places are left out."""
    modules = named_modules(model)
    sites = tuple(site for site in plan if site.key in places)
    chosen = Plan(sites, tuple(len(places[site.key]) for site in sites))
    return attach(
        model, chosen, lambda site: MaskedSlot(site, slots, places[site.key], channel_dim(modules[site.name]))
    )


def fisher(weights: Mapping[str, Any], losses: Iterable[Tensor], remedy: str) -> dict[str, Tensor]:
    """Returns the empirical Fisher information of weights: the sum over losses of their squared gradients, float32.

    Args:
        weights: by name; their ``requires_grad`` flags are as before at the end.
        losses: negative log-likelihoods of one sample each, computed as they are asked for (a generator), so that the
            weights can have gradients.
        remedy: of weights that have none.

    Raises:
        InputError: no losses, or losses that were computed before.
        SiteError: a weight that is quantised or sharded.
    """
    for name, weight in weights.items():
        if not is_dense(weight):
            raise SiteError(name, told(weight), remedy)
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    sums, samples = {name: torch.zeros(weight.shape) for name, weight in weights.items()}, 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            for loss in losses:
                if not loss.requires_grad:
                    raise InputError("the losses", "they were computed before", "give a generator")
                slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for total, slope in zip(sums.values(), slopes, strict=True):
                    if slope is not None:
                        total += slope.cpu().float().square()
                samples += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
    if not samples:
        raise InputError("the losses", "there are none", "give at least one")
    return sums


class ChangeSlot(Slot):
    """A change of a parameter itself, whatever `delta` makes it of."""

    def __init__(self, site: Site, slots: int, dim: int):
        """Makes an empty slot; torch's attention and biases take the change as an addition, all else in the weight."""
        super().__init__(site, slots, weight_mode=site.kind not in ("mha", "bias"))
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y with the changed bias, or with the change's product."""
        if self.site.kind == "bias":
            return y + spread(self.delta(0)[None], y, self.dim)
        return y + F.linear(x, self.delta(0).to(x.dtype))

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns the weight or the bias with its change."""
        if self.site.kind != "bias":
            return super().folded(slot, now, base)
        assert now.bias is not None
        return now._replace(bias=now.bias + self.delta(slot))


class MaskedSlot(ChangeSlot):
    """Changes of a parameter at fixed places."""

    saved: ClassVar[tuple[str, ...]] = ("places",)
    places: Tensor

    def __init__(self, site: Site, slots: int, places: Tensor, dim: int):
        """Makes changes of zero at the places, flat indices."""
        super().__init__(site, slots, dim)
        self.D = nn.Parameter(torch.zeros(slots, len(places)))
        self.register_buffer("places", places.repeat(slots, 1))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Sets the changes to zero."""
        self.D[slot].zero_()

    def delta(self, slot: int) -> Tensor:
        """Returns the changes among zeros."""
        whole = self.D.new_zeros(prod(self.site.covered))
        return self.scale[slot] * whole.scatter(0, self.places[slot], self.D[slot]).view(self.site.covered)
