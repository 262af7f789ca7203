"""Prefix tuning: in every layer trained keys and values stand before those of the sequence.

Xiang Lisa Li, Percy Liang: Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, arXiv:2101.00190. Without
the network (``hidden`` none) it is P-tuning v2: Xiao Liu et al., 2021, arXiv:2110.07602.

    K <- [P_K; K],  V <- [P_V; V]  in each layer;    all P = W tanh(V e + v) + w  for each of ``length`` rows e of E

E (length, d) is drawn normal and the network as torch draws linear layers, as in the authors' code. Parameters:
length * d + hidden * (d + 1) + 2 L k (hidden + 1) for L layers with keys of width k; length * 2 L k without the
network. Sites are the decoders of transformers, whose cache the prefix is put into, so that the sequence's positions
begin after it; and in a model without one every attention that torch computes (timm, open_clip, diffusers, encoders of
transformers), where keys and values are lengthened on their way into ``scaled_dot_product_attention``; all of them
share E, V and v. Every row of a batch has a prefix, each its own if routed; there is none to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.prompt_tuning import among, by_name, cached, lengthen, sequences
from graft.studio.sites import Model, Plan, Site, named_modules, plan_blocks, plan_sites
from graft.studio.slot import Slot
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class PrefixTuning(SiteMethod):
    """Trained keys and values before those of every layer."""

    kinds = ("kv",)
    when = "where a prompt at the input is too weak, above all in language models"

    length: int = 10
    """Keys and values of each layer."""
    hidden: int | None = 512
    """Inside of the network that makes them; none trains them directly."""
    targets: str | tuple[str, ...] = ()
    """Paths of decoders or attentions, as patterns, or attention; when not given decoders, else all attentions."""
    towers: tuple[str, ...] | None = None
    """Not used: a path says it."""

    def __post_init__(self) -> None:
        check(
            self,
            length=(self.length >= 1, "at least 1"),
            hidden=(self.hidden is None or self.hidden >= 1, "at least 1"),
        )

    def sites(self, model: Model) -> Plan:
        """Returns the places; the shape is (layers, 2, heads, width of a head, width of the model)."""
        modules = named_modules(model)
        decoders = [
            Site(site.name, "kv", _shape(modules[site.name]), role=site.role)
            for site in sequences(model, "kv")
            if site.role == "decoder"
        ]
        return among([*decoders, *_attentions(model)], self.targets)

    def count(self, site: Site) -> int:
        """Returns the numbers of the prefix, or of what makes it; attentions share all but the last layer."""
        flat = torch.Size(site.shape[:-1]).numel()
        if self.hidden is None:
            return self.length * flat
        return flat * (self.hidden + 1) + (self._shared(site) if site.role == "decoder" else 0)

    def _shared(self, site: Site) -> int:
        """Numbers of E, V and v."""
        width = site.shape[-1]
        return 0 if self.hidden is None else self.length * width + self.hidden * (width + 1)

    def plan(self, model: Model) -> Plan:
        """Returns the places; what attentions share counts with the first of them."""
        plan = super().plan(model)
        first = next((site for site in plan if site.role != "decoder"), None)
        more = [self._shared(site) if site is first else 0 for site in plan]
        return Plan(plan.sites, tuple(map(sum, zip(plan.counts, more, strict=True))))

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the prefix of a decoder or an attention."""
        return (DecoderPrefix if site.role == "decoder" else AttentionPrefix)(site, slots, self)

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches as every method, and gives all attentions the same E, V and v."""
        handle = super().attach(model, slots, plan)
        attentions = handle.slots_of(AttentionPrefix) if self.hidden is not None else []
        for each in attentions[1:]:
            each.E, each.V, each.v = attentions[0].E, attentions[0].V, attentions[0].v
        return handle

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for peft."""
        from graft.studio.formats import prompts

        return prompts.export(adapter, folder) if format == "peft" else super().export(adapter, folder, format)


def _shape(module: Any) -> tuple[int, ...]:
    config = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (config.num_hidden_layers, 2, heads, width, config.hidden_size)


def _attentions(model: Model) -> list[Site]:
    """The attentions, each with the width of its keys; E has the width of the first one's output."""
    try:
        blocks, keys = plan_blocks(model, "attention"), plan_sites(model, "k")
    except SiteError:
        return []
    found = []
    for block in blocks:
        width = next(key.covered[0] for key in keys if f"{key.name}.".startswith(f"{block.name}."))
        shape = (1, 2, 1, width, blocks.sites[0].shape[0])
        found.append(Site(block.name, "kv", shape, tower=block.tower, role=block.role))
    return found


class PrefixSlot(Slot):
    """Keys and values before those of a decoder's layers, or of one attention."""

    mergeable = False
    fades: ClassVar[bool] = False

    def __init__(self, site: Site, slots: int, method: PrefixTuning):
        """Makes the prefix, or what makes it."""
        super().__init__(site, slots)
        *self.keys, width = site.shape
        flat = torch.Size(self.keys).numel()
        self.hidden = method.hidden
        self.E = nn.Parameter(torch.empty(slots, method.length, flat if method.hidden is None else width))
        if method.hidden is not None:
            self.V = nn.Parameter(torch.empty(slots, method.hidden, width))
            self.v = nn.Parameter(torch.empty(slots, method.hidden))
            self.W = nn.Parameter(torch.empty(slots, flat, method.hidden))
            self.w = nn.Parameter(torch.empty(slots, flat))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the rows normal, the network uniform."""
        self.E[slot].copy_(torch.randn(self.E.shape[1:]))
        for weight, bias in [] if self.hidden is None else [(self.V, self.v), (self.W, self.w)]:
            limit = 1 / sqrt(weight.shape[-1])
            for stack in (weight, bias):
                stack[slot].copy_(torch.empty(stack.shape[1:]).uniform_(-limit, limit))

    def flat(self) -> Tensor:
        """Returns the prefix of all slots, (k, length, layers * 2 * heads * width)."""
        if self.hidden is None:
            return self.E
        inside = torch.tanh(self.E @ self.V.mT + self.v[:, None])
        return inside @ self.W.mT + self.w[:, None]


class DecoderPrefix(PrefixSlot):
    """Keys and values before those of all layers of a decoder."""

    def around(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder with the prefix in its cache; a cache that is filled has it already.

        Raises:
            SiteError: gradient checkpointing, under which transformers drops every cache.
        """
        given = by_name(module, args, kwargs)
        if getattr(module, "gradient_checkpointing", False) and module.training:
            reason = "gradient checkpointing drops the cache, and the prefix with it"
            raise SiteError(self.site.key, reason, "turn it off, or use prompt_tuning")
        lengthen(given, self.E.shape[1], self.site.key, within=False)
        if cached(given):
            return call(**given)
        own = given.get("past_key_values") is None
        if own:
            from transformers import DynamicCache

            given["past_key_values"] = DynamicCache(config=module.config)
        sequence = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        (prefix, _) = self.pick(self.flat())
        prefix = prefix.expand(sequence.shape[0], -1, -1).unflatten(-1, self.keys).permute(2, 3, 0, 4, 1, 5)
        for layer, (key, value) in enumerate(prefix.to(module.dtype)):  # each (b, heads, length, width)
            given["past_key_values"].update(key.contiguous(), value.contiguous(), layer)
        out = call(**given)
        if own and not given.get("use_cache"):
            out["past_key_values"] = None
        return out


class AttentionPrefix(PrefixSlot):
    """Keys and values before those of one attention."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the attention with more keys and values.

        Raises:
            SiteError: an attention that does not call torch's function, or does so several times.
        """
        (prefix, _) = self.pick(self.flat())
        before = _Before(prefix.unflatten(-1, (2, -1)), self.site.key)
        with before:
            out = call(*args, **kwargs)
        if before.calls != 1:
            reason = f"it calls torch's scaled_dot_product_attention {before.calls} times, and one has the prefix"
            raise SiteError(self.site.key, reason, 'load the model with attention = "sdpa", or leave this one out')
        return out


class _Before(TorchFunctionMode):
    """Puts keys and values before those that torch's attention is called with."""

    def __init__(self, prefix: Tensor, where: str):
        """Takes (g, length, 2, width), g the batch or 1."""
        super().__init__()
        self.prefix, self.where, self.calls = prefix, where, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        (groups, length, *_), batch = self.prefix.shape, given["key"].shape[0]
        if groups not in (1, batch):
            raise SiteError(self.where, f"got a batch of {batch} for a route of {groups} rows", "route(None)")
        mask = given.pop("attn_mask", None)
        if given.pop("is_causal", False):
            mask = given["query"].new_ones(given["query"].shape[-2], given["key"].shape[-2], dtype=torch.bool).tril()
        if mask is not None:
            given["attn_mask"] = F.pad(mask, (length, 0), value=float(mask.dtype == torch.bool))  # all see the prefix
        for name, part in zip(("key", "value"), self.prefix.unbind(2), strict=True):
            own = given[name]  # (b, heads, n, width of a head)
            part = part.unflatten(-1, (own.shape[1], -1)).transpose(1, 2).expand(batch, -1, -1, -1)
            given[name] = torch.cat([part.to(own.dtype), own], 2)
        return func(**given)
