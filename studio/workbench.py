"""Low-rank adapters reworked without training: cut to another rank, added up, or made from the difference of two bases.

All three end in the best factors of rank r of a change D (o, i) of a weight, by singular values (Eckart, Young: The
approximation of one matrix by another of lower rank, 1936):

    B A = U[:, :r] diag(s[:r]) V[:r],    || D - B A ||^2 = sum of s[r:]^2

and tell per module, and over all, what is left out: `error` = || D - B A || / || D || in the Frobenius norm, measured
on the factors as they are written, in float32. Instead of a rank, a share of the energy may be kept: the smallest r
with sum of s[:r]^2 >= keep * sum of s^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from graft.studio import registry
from graft.studio.adapter import Adapter, Card
from graft.studio.errors import BaseMismatchError, InputError
from graft.studio.formats.low_rank import config_of
from graft.studio.sites import Plan, Site, is_dense, named_modules, plan_sites, weight_names

_FACTORS = ("A", "B", "m")


@dataclass(frozen=True)
class Loss:
    """What became of the change of one module."""

    module: str
    """Its site."""
    rank: int
    """Of the factors that are kept."""
    size: float
    """|| D ||, of the whole change."""
    lost: float
    """|| D - B A ||."""

    @property
    def error(self) -> float:
        """Share that is lost."""
        return self.lost / self.size if self.size else 0.0


@dataclass(frozen=True)
class Reworked:
    """An adapter, and what it lost."""

    adapter: Adapter
    """The result."""
    losses: list[Loss]
    """One per site."""
    elsewhere: list[str] = field(default_factory=list)
    """Tensors that differ too and that no factor can hold: norms, biases, tables."""
    elsewhere_size: float = 0.0
    """Norm of their change."""

    @property
    def error(self) -> float:
        """Share of the change that is lost over all modules, with what differs elsewhere."""
        whole = sqrt(sum(loss.size**2 for loss in self.losses) + self.elsewhere_size**2)
        lost = sqrt(sum(loss.lost**2 for loss in self.losses) + self.elsewhere_size**2)
        return lost / whole if whole else 0.0


@dataclass(frozen=True)
class Cut:
    """How much of a change is kept."""

    rank: int | None = None
    """Largest rank; None leaves it to ``keep``."""
    keep: float | None = None
    """Share of the energy, the squared singular values; None keeps what the rank holds."""

    def __post_init__(self) -> None:
        if self.rank is None and self.keep is None:
            raise InputError("neither rank nor keep", "nothing says how much to keep", "give --rank 8, or --keep 0.9")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank {self.rank}", "must be at least 1", "4 to 32 is usual")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"keep {self.keep}", "must be above 0, up to 1", "0.9 is usual")

    def of(self, values: Tensor) -> int:
        """The rank to keep of singular values, largest first."""
        energy = values.double().square()
        enough = len(values)
        if self.keep is not None:
            enough = 1 + int((energy.cumsum(0) < self.keep * energy.sum() * (1 - 1e-12)).sum())
        return max(1, min(enough, self.rank or enough, len(values)))


def resize(adapter: Adapter, cut: Cut) -> Reworked:
    """Cuts a LoRA, or what is one in the end, to a smaller rank; a rank that is larger than its own changes nothing.

    What else it holds (the lengths of a DoRA, a word) stays as it is.

    Raises:
        InputError: an adapter without such factors.
    """
    adapter = plain(adapter)
    tensors, losses = dict(adapter.tensors), []
    for site, down, up in factors(adapter):
        tensors[f"{site.key}.A"], tensors[f"{site.key}.B"], loss = _best(site, down, up, cut)
        losses.append(loss)
    return Reworked(_made(adapter, tensors, losses, f"resized ({_told(cut)})"), losses)


def add(adapters: Sequence[Adapter], weights: Sequence[float], cut: Cut | None = None) -> Reworked:
    """Adds up the changes of several LoRAs, each times its weight: their ranks side by side, or cut down.

    Raises:
        InputError: other methods, weights that are not one for each, or sites of different models.
        BaseMismatchError: adapters of different bases.
    """
    if len(adapters) != len(weights):
        raise InputError(f"{len(weights)} weights", f"there are {len(adapters)} adapters", "give one for each: 0.7,0.3")
    adapters = _spelled_alike([plain(adapter) for adapter in adapters])
    first = _one_base(adapters)
    parts: dict[str, list[tuple[Site, Tensor, Tensor]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if other := [name for name in adapter.tensors if name.rpartition(".")[2] not in ("A", "B")]:
            reason = f"{adapter.card.method} holds more than factors, which cannot be added up"
            raise InputError(other[0], reason, "merge it into the base")
        for site, down, up in factors(adapter):
            parts.setdefault(site.key, []).append((site, down, weight * up))
    tensors, losses, sites = {}, [], []
    for key, found in parts.items():
        site = found[0][0]
        if odd := next((other for other, _, _ in found if other.shape != site.shape), None):
            reason = f"{odd.shape} in one adapter, {site.shape} in another"
            raise InputError(key, reason, "give adapters of one base")
        down, up = torch.cat([down for _, down, _ in found]), torch.cat([up for _, _, up in found], 1)
        tensors[f"{key}.A"], tensors[f"{key}.B"], loss = _best(site, down, up, cut)
        losses.append(loss)
        sites.append(site)
    triggers = dict.fromkeys(adapter.card.trigger for adapter in adapters if adapter.card.trigger)
    details = {name: value for name, value in first.card.details.items() if name != "provenance"}
    card = replace(
        first.card,
        config={**first.card.config, "targets": [site.name for site in sites]},
        sites=Plan(tuple(sites)).to_list(),
        metrics={},
        data_digest=",".join(adapter.card.data_digest for adapter in adapters),
        trigger=" and ".join(triggers) or None,
        details=details | {"weights": list(weights)},
    )
    told = f"sum of {len(adapters)} with weights {', '.join(f'{weight:g}' for weight in weights)}"
    if cut is not None:
        told += f" ({_told(cut)})"
    return Reworked(_made(Adapter(tensors, card), tensors, losses, told), losses)


def extract(tuned: Any, base: Any, cut: Cut, targets: str = "all") -> Reworked:
    """Takes a LoRA from the difference of two bases of one architecture: attached to ``base`` it does what it can of
    what makes ``tuned``.

    Raises:
        InputError: two architectures, weights that are not plain, or no difference.
    """
    new, old = _state(tuned), _state(base)
    if odd := {name for name in set(new) | set(old) if name not in new or name not in old}:
        raise InputError(min(odd), f"only one of {tuned.name} and {base.name} has it", "give bases of one architecture")
    if shapes := [name for name in old if old[name].shape != new[name].shape]:
        reason = f"{tuple(new[shapes[0]].shape)} in {tuned.name}, {tuple(old[shapes[0]].shape)} in {base.name}"
        raise InputError(shapes[0], reason, "give bases of one architecture")
    modules: dict[str, Any] = named_modules(base.modules)
    tensors, losses, sites, covered = {}, [], [], set()
    for site in plan_sites(base.modules, targets):
        name = f"{site.name}.{weight_names(modules[site.name])[0]}"
        covered.add(name)
        rows = slice(*site.rows) if site.rows is not None else slice(None)
        change = (new[name][rows].double() - old[name][rows].double()).flatten(1)
        if not change.any():
            continue
        change = change.T if site.kind == "embedding" else change
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        kept = cut.of(s)
        root = s[:kept].sqrt()
        down, up = (root[:, None] * v[:kept]).float(), (u[:, :kept] * root).float()
        losses.append(_loss(site, change, down, up))
        tensors[f"{site.key}.A"], tensors[f"{site.key}.B"] = down.view(kept, *_inside(site)), up
        sites.append(site)
    elsewhere = [name for name in old if name not in covered and not torch.equal(new[name], old[name])]
    size = sqrt(sum(float((new[name].double() - old[name].double()).square().sum()) for name in elsewhere))
    if not sites:
        held = f"only {', '.join(elsewhere[:3])} differ" if elsewhere else "their weights are the same"
        raise InputError(f"{tuned.name} and {base.name}", held, "give a base and what was made of it")
    names = list(dict.fromkeys(site.name for site in sites))
    card = Card(
        "lora", {"rank": 1, "alpha": 1.0, "targets": names}, "", base.name, base.hash, Plan(tuple(sites)).to_list()
    )
    made = _made(Adapter(tensors, card), tensors, losses, f"extracted from {tuned.name} ({_told(cut)})")
    return Reworked(made, losses, elsewhere, size)


def plain(adapter: Adapter) -> Adapter:
    """The adapter as A and B at every site (and m of a DoRA), whatever made them.

    Raises:
        InputError: a method whose result is no product of two factors.
    """
    card = adapter.card
    if not {"rank", "alpha"} <= set(card.config):
        raise InputError(f"method {card.method}", "it has no low-rank factors", "give a LoRA")
    if not card.domain and card.method not in ("lora", "dora"):
        cls = registry.site_method(card.method)
        if not hasattr(cls, "as_lora"):
            raise InputError(f"method {card.method}", "it is no LoRA in the end", "give a LoRA")
        adapter = cls.as_lora(adapter)
        shared = {"rank", "alpha", "rslora", "targets", "towers"}
        kept = {name: value for name, value in adapter.card.config.items() if name in shared}
        adapter = replace(adapter, card=replace(adapter.card, method="lora", config=kept))
    keys = {site.key for site in Plan.from_list(adapter.card.sites)}
    for name in adapter.tensors:
        key, _, end = name.rpartition(".")
        if key in keys and end not in _FACTORS:
            raise InputError(name, f"{card.method} is more than two factors", "give a LoRA")
    return adapter


def factors(adapter: Adapter) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Yields each site with A (r, i...) and B (o, r), the scale multiplied into B."""
    scaling = config_of(adapter).scaling
    for site in Plan.from_list(adapter.card.sites):
        down, up = adapter.tensors.get(f"{site.key}.A"), adapter.tensors.get(f"{site.key}.B")
        if down is None or up is None:
            raise InputError(site.key, "the adapter has no factors for it", "export the adapter again")
        yield site, down.float(), scaling * up.float()


def _best(site: Site, down: Tensor, up: Tensor, cut: Cut | None) -> tuple[Tensor, Tensor, Loss]:
    """The best factors of a product; without a cut, itself."""
    inside = down.flatten(1)
    change = up.double() @ inside.double()
    if cut is None or cut.keep is None and down.shape[0] <= (cut.rank or 0):
        return down, up, _loss(site, change, inside, up)
    right, r = torch.linalg.qr(inside.double().T)
    left, q = torch.linalg.qr(up.double())
    u, s, v = torch.linalg.svd(q @ r.T, full_matrices=False)
    kept = cut.of(s)
    root = s[:kept].sqrt()
    thin = ((root[:, None] * v[:kept]) @ right.T).float()
    wide = (left @ (u[:, :kept] * root)).float()
    return thin.view(kept, *down.shape[1:]), wide, _loss(site, change, thin, wide)


def _loss(site: Site, change: Tensor, down: Tensor, up: Tensor) -> Loss:
    lost = change - up.double() @ down.double()
    return Loss(site.key, down.shape[0], float(change.norm()), float(lost.norm()))


def _inside(site: Site) -> tuple[int, ...]:
    """Shape of A behind its rank."""
    return (site.shape[0],) if site.kind == "embedding" else site.covered[1:]


def _made(adapter: Adapter, tensors: Mapping[str, Tensor], losses: Sequence[Loss], told: str) -> Adapter:
    """The adapter with new factors, whose scale is 1: alpha equals the largest rank."""
    rank = max(loss.rank for loss in losses)
    config = {**adapter.card.config, "rank": rank, "alpha": float(rank)}
    if "rslora" in config:
        config["rslora"] = False
    details = {**adapter.card.details, "reworked": [*adapter.card.details.get("reworked", []), told]}
    return Adapter(dict(tensors), replace(adapter.card, config=config, details=details))


def _told(cut: Cut) -> str:
    parts = [f"rank {cut.rank}" if cut.rank else "", f"{100 * cut.keep:g} % of the energy" if cut.keep else ""]
    return ", ".join(part for part in parts if part)


def _state(base: Any) -> dict[str, Tensor]:
    """All weights by component and name."""
    state = {}
    for component, module in base.modules.items():
        for name, tensor in module.state_dict().items():
            if not is_dense(tensor) and tensor.is_floating_point():
                raise InputError(
                    f"{component}.{name}", "its weight is no plain tensor", "give bases that are not quantised"
                )
            state[f"{component}.{name}"] = tensor.detach().cpu()
    return state


def _one_base(adapters: Sequence[Adapter]) -> Adapter:
    """An adapter whose card is right for all."""
    hashes = {adapter.card.base_hash: adapter.card.base for adapter in adapters if adapter.card.base_hash}
    if len(hashes) > 1:
        given = " and ".join(f"{name} ({digest[:12]})" for digest, name in hashes.items())
        raise BaseMismatchError(given, "these are adapters of different bases", "train them on one base")
    domains = {(adapter.card.domain, adapter.card.method) for adapter in adapters if adapter.card.domain}
    if len(domains) > 1 or any(adapter.card.method not in ("lora", *(m for _, m in domains)) for adapter in adapters):
        given = ", ".join(dict.fromkeys(adapter.card.method for adapter in adapters))
        raise InputError(given, "these cannot be added up", "give LoRAs of one domain")
    ranked = sorted(adapters, key=lambda adapter: (not adapter.card.domain, not adapter.card.base_hash))
    return ranked[0]


def _spelled_alike(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Modules of a text encoder that some files call ``text_model.x`` and others ``x`` get one name."""
    names = set(chain.from_iterable((site["name"] for site in adapter.card.sites) for adapter in adapters))
    short = {
        name: other for name in names if (other := name.replace(".text_model.", ".", 1)) != name and other in names
    }
    alike = []
    for adapter in adapters:
        plan = [replace(site, name=short.get(site.name, site.name)) for site in Plan.from_list(adapter.card.sites)]
        keys = {old.key: new.key for old, new in zip(Plan.from_list(adapter.card.sites), plan, strict=True)}
        parts = {name: name.rpartition(".") for name in adapter.tensors}
        tensors = {f"{keys.get(key, key)}.{end}": adapter.tensors[name] for name, (key, _, end) in parts.items()}
        alike.append(Adapter(tensors, replace(adapter.card, sites=Plan(tuple(plan)).to_list())))
    return alike
