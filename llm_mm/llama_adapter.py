"""LLaMA-Adapter: in the last layers every position also attends to trained prompts, through a gate that starts shut.

Renrui Zhang, Jiaming Han, Chris Liu, Peng Gao, Aojun Zhou, Xiangfei Hu, Shilin Yan, Pan Lu, Hongsheng Li, Yu Qiao:
LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, 2023, arXiv:2303.16199.

    y = softmax(S_x + mask) V_x + tanh(g) softmax(q K_P' / sqrt d) V_P,    K_P = P W_k,  V_P = P W_v

in the last ``layers`` layers, for each head: S_x, V_x are the layer's own, q its query with its rotation, P the layer's
prompt (num_tokens, width) and W_k, W_v the layer's frozen projections. P starts normal and g, one for each head, at
zero, so the model starts as it was and P learns from the second step on: layers * (num_tokens * width + heads)
parameters. The prompts have no position and no mask, as in the authors' code, whose tanh the paper's equation lacks.

Differs from the authors' code: keys and values are shared by query heads where the layer does so; a layer that
normalises its keys (Qwen3) does so with the prompt's; the gates of layers without a prompt, which nothing reads, are
left out. Sites are the attentions of transformers' decoders, whatever computes them, also inside a model that reads
pictures. peft's AdaptionPrompt is the same with one gate for all heads of a layer, and without its tanh.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.kernels.gated_attention import Group, gated_attention
from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.prompt_tuning import plan_decoders
from graft.studio.sites import Model, Plan, Site, named_modules
from graft.studio.slot import Slot

_GATED = "graft_gated"
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx", "head_dim", "num_key_value_groups", "scaling", "config")


@dataclass(frozen=True)
class LlamaAdapter(SiteMethod):
    """Gated prompts in the last layers of a language model.

    Example:
        >>> handle = LlamaAdapter(num_tokens=10, layers=30).attach(model)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=9e-3)  # doctest: +SKIP
    """

    kinds: ClassVar[tuple[str, ...]] = ("kv",)
    when = "instruction tuning with 1 M parameters; needs ten times LoRA's learning rate"
    default_learning_rate: ClassVar[float] = 9e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "schedule": "cosine", "warmup_steps": 10}

    num_tokens: int = 10
    """Length of each layer's prompt."""
    layers: int = 30
    """How many layers, counted from the last, have one; all where the model has fewer."""
    targets: str | tuple[str, ...] = ()
    """Paths of decoders; found by themselves when not given."""
    towers: tuple[str, ...] | None = None
    """Not used: a path says it."""

    def __post_init__(self) -> None:
        check(
            self,
            num_tokens=(self.num_tokens >= 1, "at least 1"),
            layers=(self.layers >= 1, "at least 1"),
        )

    def rates(self) -> dict[str, float]:
        """Returns the learning rate of each part of a model: they have the same."""
        return dict.fromkeys(("language", "projector", "vision", "other"), self.default_learning_rate)

    def sites(self, model: Model) -> Plan:
        """Returns the attentions of the last layers; the shape is (heads, width of the model)."""
        return Plan(tuple(site for each in decoders(model, self.targets) for site in each[-self.layers :]))

    def count(self, site: Site) -> int:
        """Returns the numbers of the prompt, and the gates."""
        heads, width = site.shape
        return self.num_tokens * width + heads

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the prompt of an attention."""
        return GatedPrompt(site, slots, self.num_tokens, module)


def decoders(model: Model, targets: str | tuple[str, ...] = ()) -> list[list[Site]]:
    """Returns the attentions of each decoder of transformers, first layer first.

    Raises:
        SiteError: a model without a decoder, or one whose attention is of another form.
    """
    modules, found = named_modules(model), []
    for decoder in plan_decoders(model, targets, "kv"):
        inside = {name: module for name, module in modules.items() if name.startswith(f"{decoder.name}.".lstrip("."))}
        known = [name for name, module in inside.items() if all(hasattr(module, part) for part in _PARTS)]
        if not known:
            reason = "none of its attentions has layers q_proj, k_proj, v_proj and o_proj of its own"
            raise SiteError(decoder.name, reason, "use a model of the kind of Llama, Mistral, Qwen or SmolLM")
        known.sort(key=lambda name: modules[name].layer_idx)  # type: ignore[arg-type,return-value]
        found.append([Site(name, "kv", _shape(modules[name]), None, decoder.tower, "attention") for name in known])
    return found


def _shape(module: Any) -> tuple[int, int]:
    """(heads, width of the model) of an attention."""
    return module.q_proj.out_features // module.head_dim, module.k_proj.in_features


class GatedPrompt(Slot):
    """Prompt and gates of one attention."""

    mergeable = False

    def __init__(self, site: Site, slots: int, num_tokens: int, module: nn.Module):
        """Makes the prompt, if it has rows, and the gates.

        Raises:
            SiteError: an attention of another shape than was planned.
        """
        super().__init__(site, slots)
        if _shape(module) != site.shape:
            reason = f"planned for {site.shape} heads and width, the model has {_shape(module)}"
            raise SiteError(site.name, reason, "use its own base")
        heads, width = site.shape
        self.P = nn.Parameter(torch.empty(slots, num_tokens, width)) if num_tokens else None
        self.g = nn.Parameter(torch.empty(slots, heads))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the prompt normal and shuts the gates."""
        if self.P is not None:
            self.P[slot].copy_(torch.randn(self.P.shape[1:]))
        self.g[slot].zero_()

    def prompt(self) -> tuple[Tensor, Tensor] | None:
        """Returns the rows' prompts, (g, m, d), and their gates, (g, h); None where there is nothing to see."""
        assert self.P is not None
        P, g, strength = self.pick(self.P, self.g)
        return P, strength[:, None] * g.tanh()

    def around(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the attention with the prompt: its config names a function that knows it, for the time of the call."""
        config = module.config
        module.config = _Gated(config, self)
        try:
            return call(*args, **kwargs)
        finally:
            module.config = config

    def attend(self, module: Any, query: Tensor, y: Tensor) -> Tensor:
        """Returns the attention over the words, y (b, n, h, d), with that over the prompt; query is (b, h, n, d)."""
        prompt = self.prompt()
        if prompt is None:
            return y
        P, gate = prompt
        P = P.to(query.dtype)
        shape = (*P.shape[:2], -1, module.head_dim)
        norm = getattr(module, "k_norm", None)
        key, value = module.k_proj(P).view(shape), module.v_proj(P).view(shape)
        key = key if norm is None else norm(key)
        if (ratio := module.scaling * sqrt(module.head_dim)) != 1:
            key = key * ratio
        key, value = (_per_head(x, query, module.num_key_value_groups) for x in (key, value))
        both = gated_attention(query, (Group(key, value, gate),), y.transpose(1, 2))
        return both.transpose(1, 2)


def _per_head(x: Tensor, query: Tensor, groups: int) -> Tensor:
    """(g, m, h / groups, d) -> (b, h, m, d) of the query's type."""
    return x.to(query.dtype).transpose(1, 2).repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1)


class _Gated:
    """A config that names another function for attention, and is the given one in everything else."""

    _attn_implementation = _GATED

    def __init__(self, config: Any, slot: GatedPrompt):
        from transformers import AttentionInterface

        self.config, self.slot = config, slot
        AttentionInterface.register(_GATED, _attend)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention of transformers, with the prompt of the slot that called it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    gated: _Gated = module.config
    module.config = gated.config  # the next one, or the model's own
    own: Any = sys.modules[type(module).__module__]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, own.eager_attention_forward)
    y, weights = function(module, query, key, value, mask, **kwargs)
    return gated.slot.attend(module, query, y), weights
