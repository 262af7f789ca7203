"""Prefix tuning: in every layer trained keys and values stand before those of the sequence.

Xiang Lisa Li, Percy Liang: Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, arXiv:2101.00190. Without
the network (``hidden`` none) it is P-tuning v2: Xiao Liu et al., 2021, arXiv:2110.07602.

    K <- [P_K; K],  V <- [P_V; V]  in each layer;    all P = W tanh(V e + v) + w  for each of ``length`` rows e of E

E (length, d) is drawn normal and the network as torch draws linear layers, as in the authors' code. Parameters:
length * d + hidden * (d + 1) + 2 L k (hidden + 1) for L layers with keys of width k; length * 2 L k without the
network. Sites are the decoders of transformers: the prefix is put into the cache, so the sequence's positions begin
after it. Every row of a batch has a prefix, each its own if routed; there is none to merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.prompt_tuning import by_name, cached, lengthen, plan_sequences
from graft.studio.sites import Model, Plan, Site, named_modules
from graft.studio.slot import Slot

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class PrefixTuning(SiteMethod):
    """Trained keys and values before those of every layer."""

    kinds = ("kv",)
    when = "language models, where a prompt at the input is too weak"

    length: int = 10
    """Keys and values of each layer."""
    hidden: int | None = 512
    """Inside of the network that makes them; none trains them directly."""
    targets: str | tuple[str, ...] = ()
    """Paths of decoders; found by themselves when not given."""
    towers: tuple[str, ...] | None = None
    """Not used: a path says it."""

    def __post_init__(self) -> None:
        check(
            self,
            length=(self.length >= 1, "at least 1"),
            hidden=(self.hidden is None or self.hidden >= 1, "at least 1"),
        )

    def sites(self, model: Model) -> Plan:
        """Returns the decoders; the shape is (layers, 2, heads, width of a head, width of the model)."""
        modules = named_modules(model)
        plan = plan_sequences(model, self.targets, ("decoder",), "kv")
        return Plan(tuple(Site(site.name, "kv", _shape(modules[site.name]), role=site.role) for site in plan))

    def count(self, site: Site) -> int:
        """Returns the numbers of the prefix, or of the rows and the network that make it."""
        *keys, width = site.shape
        flat = torch.Size(keys).numel()
        if self.hidden is None:
            return self.length * flat
        return self.length * width + self.hidden * (width + 1) + flat * (self.hidden + 1)

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the prefix of a decoder."""
        return PrefixSlot(site, slots, self)

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


class PrefixSlot(Slot):
    """Keys and values before those of all layers of a decoder."""

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

    def around(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder with the prefix in its cache; a cache that is filled has it already.

        Raises:
            SiteError: gradient checkpointing, under which transformers drops every cache.
        """
        given = by_name(call, args, kwargs)
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
