"""Ladder side-tuning: a thin network beside the model learns from its hidden states; no gradient passes the model.

Yi-Lin Sung, Jaemin Cho, Mohit Bansal: LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning,
2022, arXiv:2206.06522.

    s <- mu_l s + (1 - mu_l) D_l h_l,  mu_l = sigmoid(a_l / temperature),  s <- block_l(s);    y = h + U norm(s)

h_l is the output of layer l, h the model's last hidden state, s starts as D_0 of the embedded words. The blocks are of
the model's own kind, ``reduction`` times thinner: width, feed-forward part and number of heads, each head as wide as
the model's. They are cut out of the model's (``pruning``): rows of a weight that matter most stay, and the columns that
read what stays. A row matters as much as the sum of its magnitudes, or of its Fisher information, which is the mean
over samples of the squared gradient of log p(y | x). a starts at zero, the rest as torch draws it, U at zero, so that
the model starts as it was.

Memory: the model runs without autograd. Kept for the backward pass is what the thin blocks compute, and the hidden
states themselves, which the D_l have as input. Generation keeps keys and values of the blocks in the model's own cache.

Differs from the authors' code: the side's output is added to the model's instead of replacing it; heads stay or go
whole, and all blocks keep the same part of the stream between them, where theirs choose rows of each weight in turn;
``every`` leaves out layers evenly instead of by hand. Sites are decoders of transformers with a list of ``layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.studio.errors import InputError, SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.fish_mask import fisher
from graft.studio.methods.prompt_tuning import by_name, cached, plan_decoders
from graft.studio.network_slot import NetworkSlot
from graft.studio.sites import Model, Plan, Site, named_modules
from graft.studio.slot import Slot
from graft.studio.slots import Handle
from graft.studio.slotted import Slotted, dense_weight


@dataclass(frozen=True)
class LadderSideTuning(SiteMethod):
    """A thin network beside a language model, which keeps nothing of it for the backward pass."""

    kinds = ("kv",)
    when = "memory for activations is very short, and a little more time for each answer is not"

    reduction: int = 8
    """How many times thinner than the model the side is."""
    every: int = 1
    """Takes every so manyth layer's hidden state, the last one among them."""
    temperature: float = 0.1
    """Of the gates between the side and the hidden states; small ones switch sharply."""
    pruning: Literal["magnitude", "fisher", "none"] = "magnitude"
    """What of the model's blocks the side's are cut out of: where weights are large, or where their Fisher information
    is, for which some rows pass the model forward and backward before; with "none" torch draws them."""
    targets: str | tuple[str, ...] = ()
    """Paths of decoders; found by themselves when not given."""
    towers: tuple[str, ...] | None = None
    """Not used: a path says it."""

    def __post_init__(self) -> None:
        check(
            self,
            reduction=(self.reduction >= 1, "at least 1"),
            every=(self.every >= 1, "at least 1"),
            temperature=(self.temperature > 0, "above 0"),
        )

    def sites(self, model: Model) -> Plan:
        """Returns the decoders; the shape is (blocks of the side, width of the model, of the side, parameters).

        Raises:
            SiteError: no decoder of transformers, or one without a list of layers.
        """
        modules, found = named_modules(model), []
        for site in plan_decoders(model, self.targets, "kv"):
            decoder: Any = modules[site.name]
            if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not hasattr(decoder, "norm"):
                reason = "it has no list of layers and a norm behind them"
                raise SiteError(site.name, reason, "use a model of the kind of Llama, Mistral, Qwen or SmolLM")
            known = {owner for owners in _CUT.values() for owner in owners}
            inside = [name for name, part in decoder.layers[0].named_modules() if isinstance(part, nn.Linear)]
            strange = [name for name in inside if name.rpartition(".")[2] not in known]
            if self.pruning != "none" and strange:
                reason = f"its layers have {', '.join(strange)}, of which it is not known what to cut out"
                raise SiteError(site.name, reason, "set pruning = 'none'")
            with torch.device("meta"):
                side = self.side(decoder)
            count = sum(parameter.numel() for parameter in side.parameters())
            shape = (len(side.blocks), *reversed(side.up.weight.T.shape), count)
            found.append(Site(site.name, "kv", shape, role="decoder"))
        return Plan(tuple(found))

    @property
    def needs_losses(self) -> bool:
        """Whether `attach` asks for losses."""
        return self.pruning == "fisher"

    def attach(
        self, model: Model, slots: int = 1, plan: Plan | None = None, losses: Iterable[Tensor] | None = None
    ) -> Handle:
        """Attaches as every method.

        Args:
            model: the model or its components.
            slots: how many at once.
            plan: instead of the method's own.
            losses: with ``pruning`` "fisher", negative log-likelihoods of one sample each, computed as they are asked
                for (a generator).

        Raises:
            InputError: no losses where there must be some, or losses that were computed before.
            SiteError: as `SiteMethod.attach`; with "fisher", weights that are quantised or sharded.
        """
        if not self.needs_losses:
            return super().attach(model, slots, plan)
        if losses is None:
            remedy = "give attach(losses=...), or set pruning = 'magnitude'"
            raise InputError("pruning = 'fisher'", "it cuts out what losses say, and there are none", remedy)
        modules = named_modules(model)
        found = _fisher({site.name: modules[site.name] for site in self.sites(model)}, losses)
        handle = replace(self, pruning="none").attach(model, slots, plan)
        handle.rule = self
        for each in handle.slots_of(SideSlot):
            each.make = partial(self.side, modules[each.site.name], found[each.site.name])
            for slot in range(slots):
                each.reset(slot)
        return handle

    def attach_trained(self, model: Model, plan: Plan, tensors: Mapping[str, Tensor]) -> Handle:
        """Attaches what a trained adapter's tensors will be loaded into, so nothing is cut out."""
        return replace(self, pruning="none").attach(model, plan=plan)

    def side(self, decoder: Any, sizes: Sequence[Mapping[str, Tensor]] | None = None) -> Side:
        """Returns a new side of a decoder; ``sizes`` as in `cut_out`."""
        side = Side(decoder, self.reduction, self.every, self.temperature)
        if self.pruning != "none" and not side.up.weight.is_meta:
            cut_out(side, decoder, sizes)
        return side

    def count(self, site: Site) -> int:
        """Returns what was counted when the site was planned."""
        return site.shape[-1]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the side of a decoder."""
        return SideSlot(site, slots, partial(self.side, module))


class Side(nn.Module):
    """The ladder: projections of the hidden states, blocks, and the way back to the model's width."""

    def __init__(self, decoder: Any, reduction: int, every: int, temperature: float):
        super().__init__()
        layers, width = list(decoder.layers), decoder.config.hidden_size
        self.taken = [i for i in range(len(layers)) if (len(layers) - 1 - i) % every == 0]
        self.temperature = temperature
        config = _thinner(decoder.config, reduction)
        kind = type(layers[0]).__bases__[1] if isinstance(layers[0], Slotted) else type(layers[0])
        norm = type(decoder.norm).__bases__[1] if isinstance(decoder.norm, Slotted) else type(decoder.norm)
        thin = config.hidden_size
        self.downs = nn.ModuleList(nn.Linear(width, thin, bias=False) for _ in range(len(self.taken) + 1))
        self.blocks = nn.ModuleList(kind(config, i) for i in self.taken)
        self.gates = nn.Parameter(torch.zeros(len(self.taken)))
        self.norm = norm(thin, eps=getattr(config, "rms_norm_eps", 1e-6))
        self.up = nn.Linear(thin, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, words: Tensor, states: list[Tensor], given: list[dict[str, Any]]) -> Tensor:
        """Embedded words (b, n, d), each taken layer's output and arguments -> (b, n, d)."""
        first, *downs = self.downs
        s = first(words)
        for k, (down, block) in enumerate(zip(downs, self.blocks, strict=True)):
            mu = (self.gates[k] / self.temperature).sigmoid()
            s = mu * s + (1 - mu) * down(states[k])
            s = block(s, **given[k])
            s = s[0] if isinstance(s, tuple) else s
        y: Tensor = self.up(self.norm(s))
        return y


def _thinner(config: Any, reduction: int) -> Any:
    """The config of a model's blocks at a fraction of their width, with heads as wide as before."""
    heads, thin = config.num_attention_heads, deepcopy(config)
    thin.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    thin.hidden_size = max(1, config.hidden_size // reduction)
    thin.intermediate_size = max(1, config.intermediate_size // reduction)
    thin.num_attention_heads = max(1, heads // reduction)
    keys = getattr(config, "num_key_value_heads", None) or heads
    thin.num_key_value_heads = gcd(thin.num_attention_heads, max(1, keys // reduction))
    return thin


_CUT = {
    "queries": ("q_proj",),
    "keys": ("k_proj", "v_proj"),
    "inside": ("gate_proj", "up_proj"),
    "stream": ("o_proj", "down_proj"),
}
"""What the rows of a layer's weights make; those of o_proj and down_proj are added to the stream between blocks."""
_READ = {"o_proj": "queries", "down_proj": "inside"}
"""What their columns read, where it is not the stream."""


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The projections of a layer by the last part of their paths."""
    return {path.rpartition(".")[2]: part for path, part in layer.named_modules() if isinstance(part, nn.Linear)}


def _fisher(decoders: Mapping[str, Any], losses: Iterable[Tensor]) -> dict[str, list[dict[str, Tensor]]]:
    """Fisher information of the weights of each decoder's layers' projections."""
    weights = {
        f"{where}.layers.{i}.{name}": part._parameters["weight"]
        for where, decoder in decoders.items()
        for i, layer in enumerate(decoder.layers)
        for name, part in _linears(layer).items()
    }
    found = fisher(weights, losses, "set pruning = 'magnitude'")
    return {
        where: [
            {name: found[f"{where}.layers.{i}.{name}"] for name in _linears(layer)}
            for i, layer in enumerate(decoder.layers)
        ]
        for where, decoder in decoders.items()
    }


@torch.no_grad()
def cut_out(side: Any, decoder: Any, sizes: Sequence[Mapping[str, Tensor]] | None = None) -> None:
    """Fills a side's blocks, and the norm behind them, with the parts of a decoder's that matter most.

    Args:
        side: whose blocks are filled.
        decoder: of transformers.
        sizes: of each of its layers, what each number of a projection's weight counts, by the projection's name; None
            is its magnitude.
    """
    layers = [decoder.layers[i] for i in side.taken]
    weights = [{name: dense_weight(part) for name, part in _linears(layer).items()} for layer in layers]
    loud = weights if sizes is None else [sizes[i] for i in side.taken]
    stream = _largest(sum(_rows(each[name]) for each in loud for name in _CUT["stream"]), side.up.in_features)
    for block, layer, own, size in zip(side.blocks, layers, weights, loud, strict=True):
        kept = {"stream": stream, **_heads(block, layer, size, stream)}
        inside = sum(_rows(size[name][:, stream]) for name in _CUT["inside"])
        kept["inside"] = _largest(inside, block.mlp.down_proj.in_features)
        for name, parameter in block.named_parameters():
            path, _, end = name.rpartition(".")
            module, owner = layer.get_submodule(path), path.rpartition(".")[2]
            whole = own[owner] if owner in own and end == "weight" else _whole(module._parameters[end])
            made = next((what for what, owners in _CUT.items() if owner in owners), None)
            if made is None:  # of a norm: that of the stream, of one head, or of all heads side by side
                norm = {"q_norm": "queries", "k_norm": "keys"}.get(owner, "stream")
                part = whole if len(whole) == len(parameter) else whole[kept[norm]]
            else:
                part = whole[kept[made]]
                part = part[:, kept[_READ.get(owner, "stream")]] if part.dim() == 2 else part
            parameter.copy_(part)
    for name, parameter in side.norm.named_parameters():
        parameter.copy_(_whole(decoder.norm._parameters[name])[stream])


def _heads(block: Any, layer: Any, own: Mapping[str, Tensor], stream: Tensor) -> dict[str, Tensor]:
    """Rows of the heads that stay: the largest of keys and values, and with each the largest of its queries."""
    wide, thin, width = layer.self_attn, block.self_attn, block.self_attn.head_dim
    size = {name: _rows(own[name][:, stream]).view(-1, width).sum(1) for name in ("q_proj", "k_proj", "v_proj")}
    group = wide.num_key_value_groups
    both = size["q_proj"].view(-1, group).sum(1) + size["k_proj"] + size["v_proj"]
    keys = _largest(both, thin.k_proj.out_features // width)
    queries: list[int] = []
    for key in keys.tolist():
        order = size["q_proj"].argsort(descending=True).tolist()
        order.sort(key=lambda head: head // group != key)  # its own first; others where it has too few
        queries += sorted([head for head in order if head not in queries][: thin.num_key_value_groups])
    inside = torch.arange(width, device=stream.device)
    places = torch.tensor(queries, device=stream.device)
    return {"queries": (places[:, None] * width + inside).flatten(), "keys": (keys[:, None] * width + inside).flatten()}


def _rows(weight: Tensor) -> Tensor:
    """Sum of magnitudes of each row."""
    return weight.float().abs().sum(1)


def _largest(sizes: Any, count: int) -> Tensor:
    """Places of the largest, in their own order."""
    found: Tensor = sizes.topk(count).indices.sort().values
    return found


def _whole(parameter: Any) -> Tensor:
    """A parameter, all of it where it is shared out over processes."""
    found: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return found


class SideSlot(NetworkSlot):
    """The side of a decoder."""

    gates: Tensor

    def around(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder without autograd, then the side on what its layers gave.

        Raises:
            SiteError: something before the decoder is trained too: its gradient would have to pass the model.
        """
        given = by_name(module, args, kwargs)
        embeds = given.get("inputs_embeds")
        if embeds is not None and embeds.requires_grad and torch.is_grad_enabled():
            reason = "what comes before the decoder is trained, and no gradient passes it"
            raise SiteError(self.site.key, reason, "freeze it, or use lora")
        self._make_room(module, given)
        words: list[Tensor] = []
        states: list[Tensor] = []
        told: list[dict[str, Any]] = []

        def hear(layer: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            states.append(out[0] if isinstance(out, tuple) else out)
            told.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        def hear_words(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            words.append(args[0] if args else kwargs["hidden_states"])

        layers, side = module.layers, self.network[0]
        hooks = [layers[i].register_forward_hook(hear, with_kwargs=True) for i in side.taken]
        hooks.append(layers[0].register_forward_pre_hook(hear_words, with_kwargs=True))
        try:
            with torch.no_grad():
                out = call(**given)
        finally:
            for hook in hooks:
                hook.remove()
        out["last_hidden_state"] = out["last_hidden_state"] + self.beside(module, words[0], states, told)
        return out

    def beside(self, module: Any, words: Tensor, states: list[Tensor], told: list[dict[str, Any]]) -> Tensor:
        """What is added to the last hidden state (b, n, d); each slot's side sees all rows and has its own cache."""
        _, strength = self.pick(self.gates)
        used = [0] if self.route is None else self.route.clamp(min=0).unique().tolist()
        total: Tensor | None = None
        for slot in used:
            self._point(module, slot)
            rows = strength if self.route is None else strength * (self.route == slot)
            y = self.call(slot, words, states, told) * rows[:, None, None].to(words.dtype)
            total = y if total is None else total + y
        assert total is not None
        return total

    def _point(self, module: Any, slot: int) -> None:
        """Tells the blocks their places in the cache: behind the model's own layers, slot by slot."""
        side: Any = self.network[0]
        for k, block in enumerate(side.blocks):
            block.self_attn.layer_idx = len(module.layers) + slot * len(side.taken) + k

    def _make_room(self, module: Any, given: dict[str, Any]) -> None:
        """Gives the cache layers for the blocks, of the kind of those that they follow."""
        if given.get("past_key_values") is None:
            asked = given.get("use_cache")
            given["use_cache"] = module.config.use_cache and not torch.is_grad_enabled() if asked is None else asked
            if not given["use_cache"]:
                return
            from transformers import DynamicCache

            given["past_key_values"] = DynamicCache(config=module.config)
        cache = given["past_key_values"]
        if not cached(given) and cache.layer_class_to_replicate is None:
            own, side = cache.layers[: len(module.layers)], self.network[0]
            cache.layers = own + [deepcopy(own[i]) for _ in range(self.slots) for i in side.taken]
