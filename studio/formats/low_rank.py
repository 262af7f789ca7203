"""The common form of LoRA and DoRA between file formats: for each module two factors whose product is the change of its
weight, and for DoRA the length of the changed weight's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError, InputError
from graft.studio.methods.lora import LoRA
from graft.studio.sites import Plan, Site, nearest

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LowRank:
    """Factors of one module with their scale multiplied in."""

    kind: str
    """linear, conv, embedding, or mha: the packed or the output projection of torch's MultiheadAttention."""
    down: Tensor
    """A: (r, i), (r, i, kernel...) or, for an embedding, (r, vocabulary)."""
    up: Tensor
    """B: (o, r)."""
    length: Tensor | None = None
    """m of DoRA: (o,)."""

    @property
    def rank(self) -> int:
        """Inner width."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the module's weight."""
        if self.kind == "embedding":
            return (self.down.shape[1], self.up.shape[0])
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def length_at_output(self) -> Tensor:
        """m of DoRA as other libraries lay it out: (o,), or (1, o, 1...) on a convolution."""
        assert self.length is not None
        kernel = self.down.dim() - 2
        return self.length.view(*([1, -1] if kernel else [-1]), *[1] * kernel)

    @property
    def packed(self) -> bool:
        """Whether it is the packed projection of torch's MultiheadAttention."""
        return self.kind == "mha" and self.up.shape[0] == 3 * self.down.shape[1]

    @property
    def delta(self) -> Tensor:
        """Change of the weight, float32."""
        delta = self.up.float() @ self.down.float().flatten(1)
        return (delta.T if self.kind == "embedding" else delta).reshape(self.shape)

    def padded(self, rank: int) -> LowRank:
        """Returns the same change with a larger rank, for libraries that have one rank for all modules."""
        more = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        return replace(self, down=down, up=torch.cat([self.up, self.up.new_zeros(len(self.up), more)], 1))


def from_adapter(adapter: Adapter) -> dict[str, LowRank]:
    """Returns the factors of each module; rows of a packed projection become one block-diagonal pair, which is
    exact."""
    return {name: _whole(parts) for name, parts in by_module(adapter).items()}


def by_module(adapter: Adapter) -> dict[str, list[tuple[Site, LowRank]]]:
    """Returns for each module its site, or those on rows of its projection, with their factors."""
    scaling = config_of(adapter).scaling
    modules: dict[str, list[tuple[Site, LowRank]]] = {}
    for site in Plan.from_list(adapter.card.sites):
        down, up, length = (adapter.tensors.get(f"{site.key}.{name}") for name in "ABm")
        if down is None or up is None:
            raise InputError(site.key, "the adapter has no factors for it", "export the adapter again")
        kind = "linear" if site.kind == "packed" else site.kind
        modules.setdefault(site.name, []).append((site, LowRank(kind, down, up * scaling, length)))
    return modules


def _whole(parts: Sequence[tuple[Site, LowRank]]) -> LowRank:
    """Factors of a whole module."""
    site, part = parts[0]
    if site.rows is None:
        return part
    whole = block_diagonal([(site.rows or (0, 0), part) for site, part in parts], site.shape[0])
    found = [part.length for _, part in sorted(parts, key=lambda item: item[0].rows or (0, 0))]
    lengths = [length for length in found if length is not None]
    if lengths and sum(map(len, lengths)) != site.shape[0]:  # those of other rows are the base's
        reason = "a DoRA of some rows cannot be written for the whole projection"
        raise InputError(site.name, reason, "adapt q, k and v together, or use native")
    return replace(whole, length=torch.cat(lengths) if lengths else None)


def block_diagonal(parts: Sequence[tuple[tuple[int, int], LowRank]], out: int) -> LowRank:
    """Returns the factors for ``out`` rows that do to each range of rows what its own factors do."""
    up = torch.zeros(out, sum(part.rank for _, part in parts))
    column = 0
    for (start, stop), part in parts:
        up[start:stop, column : column + part.rank] = part.up
        column += part.rank
    return LowRank(parts[0][1].kind, torch.cat([part.down for _, part in parts]), up)


def to_adapter(
    modules: Mapping[str, LowRank], domain: str, source: str, details: Mapping[str, Any] | None = None
) -> Adapter:
    """Returns factors read from another library's file as an adapter with scale 1; ranks may differ between modules."""
    if not modules:
        raise FormatError(source, "it holds no LoRA factors", "check that this is a LoRA file")
    tensors, sites = {}, []
    for name, module in modules.items():
        for site, up in _sites(name, module):
            tensors[f"{site.key}.A"], tensors[f"{site.key}.B"] = module.down.float(), up.float()
            sites.append(site)
        if module.length is not None:
            tensors[f"{name}.m"] = module.length.float()
    rank = max(module.rank for module in modules.values())
    config = {"rank": rank, "alpha": float(rank), "targets": list(modules)}
    method = "dora" if any(module.length is not None for module in modules.values()) else "lora"
    card = Card(method, config, domain, sites=Plan(tuple(sites)).to_list(), details=dict(details or {}))
    return Adapter(tensors, card)


def _sites(name: str, module: LowRank) -> list[tuple[Site, Tensor]]:
    """The sites of a module, each with its rows of B: a packed projection of torch's has three, others one."""
    if not module.packed:
        return [(Site(name, module.kind, module.shape), module.up)]
    size = module.up.shape[0] // 3
    rows = [(start, start + size) for start in range(0, 3 * size, size)]
    return [(Site(name, "mha", module.shape, each), module.up[slice(*each)]) for each in rows]


def check_written(adapter: Adapter, written: Mapping[str, LowRank], where: str) -> None:
    """Compares a file's weight changes with the adapter's own, site by site.

    Raises:
        FormatError: the file does not say the same.
    """
    scaling = config_of(adapter).scaling
    plan = Plan.from_list(adapter.card.sites)
    if extra := set(written) ^ {site.name for site in plan}:
        raise FormatError(
            where, f"modules do not match: {', '.join(sorted(extra))}", "report this: nothing was exported"
        )
    for site in plan:
        down, up = adapter.tensors[f"{site.key}.A"].float(), adapter.tensors[f"{site.key}.B"].float()
        expected = scaling * up @ down.flatten(1)
        expected = (expected.T if site.kind == "embedding" else expected).reshape(site.covered)
        found = written[site.name].delta
        found = found if site.rows is None else found[slice(*site.rows)]
        length, kept = adapter.tensors.get(f"{site.key}.m"), written[site.name].length
        if length is not None and (kept is None or not torch.equal(kept[slice(*(site.rows or (None,)))], length)):
            raise FormatError(where, f"{site.key} reads back another length", "report this: nothing was exported")
        if (found - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise FormatError(where, f"{site.key} reads back different", "report this: nothing was exported")


def pair(tensors: Mapping[str, Tensor], down_end: str, up_end: str, where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (A, B) by module from keys that end in the given suffixes.

    Raises:
        FormatError: a key of neither kind, or one without its partner.
    """
    pairs = {}
    for key, tensor in tensors.items():
        if key.endswith(up_end):
            if (partner := key.removesuffix(up_end) + down_end) not in tensors:
                raise FormatError(f"{where}: {key}", "its partner is missing", nearest(partner, tensors))
            pairs[key.removesuffix(up_end)] = (tensors[partner], tensor)
        elif not key.endswith(down_end) or key.removesuffix(down_end) + up_end not in tensors:
            reason = "not a LoRA factor, or one without its partner"
            raise FormatError(f"{where}: {key}", reason, "only plain LoRA of linear, conv and embedding is read")
    return pairs


def split_lengths(tensors: Mapping[str, Tensor], end: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns DoRA's lengths (o,) by module, from keys with this end, and the other tensors."""
    lengths = {key.removesuffix(end): tensor.flatten() for key, tensor in tensors.items() if key.endswith(end)}
    return lengths, {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def check_lengths(lengths: Mapping[str, Tensor], modules: Mapping[str, Any], where: str) -> None:
    """Raises FormatError if some modules of a DoRA have no length, or lengths no module."""
    if lengths and (odd := set(lengths) ^ set(modules)):
        raise FormatError(f"{where}: {min(odd)}", "a DoRA in which lengths or factors are missing", "export it again")


def low_rank(down: Tensor, up: Tensor, scaling: float) -> LowRank:
    """Returns the factors of a linear layer or, when A has a kernel, of a convolution, with the scale multiplied
    into B."""
    return LowRank("conv" if down.dim() > 2 else "linear", down, up.flatten(1) * scaling)


def config_of(adapter: Adapter) -> LoRA:
    """Returns what a LoRA's card says of its scale.

    Raises:
        InputError: another method's card.
    """
    config = adapter.card.config
    if not {"rank", "alpha"} <= set(config):
        raise InputError(f"method {adapter.card.method}", "not a LoRA", "export it in its own formats")
    return LoRA(rank=config["rank"], alpha=config["alpha"], rslora=config.get("rslora", False))
