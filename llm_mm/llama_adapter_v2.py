"""LLaMA-Adapter V2: bias, scale and norm of every layer, prompts, and pictures that join early or late.

Peng Gao, Jiaming Han, Renrui Zhang, Ziyi Lin, Shijie Geng, Aojun Zhou, Wei Zhang, Pan Lu, Conghui He, Xiangyu Yue,
Hongsheng Li, Yu Qiao: LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model, 2023, arXiv:2304.15010.

    y = s * (W x + b)  at every linear layer,  norms times a trained factor,  and gated prompts as in LLaMA-Adapter

s starts at 1, b at 0 and the gates at 0: the model starts as it was. What the paper says and what the authors'
``llama_adapter_v2_multimodal7b`` and ``llama_adapter_v2_chat65b`` do differ, and both are here:

- ``fusion = "early"``, the paper: k tokens of the picture, through gates of their own, are seen by the first
  ``early_layers`` layers only, and prompts by the last ``layers`` only, so that they never meet.
  ``fusion = "late"``, the code: there are as many tokens as prompt rows, and they are added to all of these.
- ``scale_at = "output"``, the paper: the equation above. ``"input"``, the code: y = W (s * x) + b.
- In training, the paper's captions teach the pictures' part and the early gates, and its instructions all else, joined
  in one training (``disjoint``). The code trains visual part, prompts and gates first, then biases, scales and norms:
  with late fusion these are the two parts. In a loop of your own, `learning` lets one part learn.

A picture's tokens come from learnt queries that pass ``visual_blocks`` transformer blocks together with the tower's
features, its class token among them. Here these are of the layer that the base's own projector reads; the code takes
CLIP's last, after its projection. A norm's factor stands beside its frozen weight: the same functions as a trained
weight. LoRA of the authors' V2.1 is `graft.studio.methods.lora`, attached beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.llm_mm.llama_adapter import GatedPrompt, decoders
from graft.llm_mm.sight import AddedPrompt, Ear, PictureSlot, SeenPrompt, connect, plan_eyes
from graft.studio.config import require
from graft.studio.errors import InputError
from graft.studio.method import SiteMethod, check
from graft.studio.sites import Model, Plan, Site, plan_sites
from graft.studio.slot import Base, Slot, spread
from graft.studio.slots import Handle

_PARTS = ("captions", "instructions")


@dataclass(frozen=True)
class LlamaAdapterV2(SiteMethod):
    """Bias, scale and norm of a language model's layers, gated prompts, and a picture's tokens."""

    kinds = ("kv", "block", "linear", "norm")
    when = "instructions about pictures, learnt beside captions"
    default_learning_rate: ClassVar[float] = 1e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "schedule": "cosine", "warmup_steps": 10}

    num_tokens: int = 10
    """Length of each layer's prompt."""
    layers: int = 31
    """How many layers, counted from the last, have one; with early fusion at most those behind the early ones."""
    fusion: Literal["early", "late", "none"] = "early"
    """Where pictures join: "early" in layers of their own (the paper), "late" added to the prompts (the code), "none"
    for a language model alone."""
    early_layers: int = 1
    """First layers that see the picture's tokens, with early fusion."""
    visual_tokens: int = 20
    """Tokens of a picture, with early fusion; late fusion has ``num_tokens``."""
    visual_blocks: int = 8
    """Transformer blocks that make them."""
    visual_width: int | None = None
    """Width of these; none takes the image tower's."""
    scale_at: Literal["output", "input"] = "output"
    """Whether a layer's output is scaled, as in the paper, or its input, as in the code."""
    disjoint: bool = False
    """Whether rows with pictures teach the picture's part alone and rows without all else, both in every batch, as in
    the paper; otherwise every row teaches all."""
    targets: str | tuple[str, ...] = ()
    """Paths of decoders; found by themselves when not given."""
    towers: tuple[str, ...] | None = None
    """Not used: a path says it."""

    def __post_init__(self) -> None:
        seeing = "early or late where method.disjoint is true"
        require("method.fusion", self.fusion, not (self.disjoint and self.fusion == "none"), seeing)
        names = ("num_tokens", "layers", "early_layers", "visual_tokens", "visual_blocks")
        check(self, **{name: (getattr(self, name) >= 1, "at least 1") for name in names})
        check(self, visual_width=(self.visual_width is None or self.visual_width >= 1, "at least 1"))

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.visual_tokens if self.fusion == "early" else self.num_tokens

    def rates(self) -> dict[str, float]:
        """Returns the learning rate of each part of a model: they have the same."""
        return dict.fromkeys(("language", "projector", "vision", "other"), self.default_learning_rate)

    def sites(self, model: Model) -> Plan:
        """Returns the part that sees, attentions, linear layers and norms; role "early" marks those of the picture."""
        found = [] if self.fusion == "none" else list(plan_eyes(model))
        layers = list(plan_sites(model, ("all-linear", "norm"), ("linear", "norm")))
        for each in decoders(model, self.targets):
            early = self.early_layers if self.fusion == "early" else 0
            first, rest = each[:early], each[early:][-self.layers :]
            found += [Site(site.name, "kv", site.shape, None, site.tower, "early") for site in first] + rest
            start = each[0].name.rpartition("layers.")[0]
            found += [site for site in layers if site.name.startswith(start)]
        return Plan(tuple(found))

    def count(self, site: Site) -> int:
        """Returns the numbers of a site's part."""
        if site.kind == "kv":
            heads, width = site.shape
            return heads + (0 if site.role == "early" else self.num_tokens * width)
        if site.role == "tower":
            return 0
        if site.kind == "block":
            c, d = site.shape
            w = self.visual_width or c
            return (c + 3 + self.tokens) * w + self.visual_blocks * (12 * w * w + 13 * w) + (w + 3) * d
        if site.kind == "norm":
            return site.shape[0]
        out, inside = site.shape
        return out + (out if self.scale_at == "output" else inside)

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns a site's part."""
        if site.kind == "norm":
            return NormFactor(site, slots)
        if site.kind == "linear":
            return (BiasScale if self.scale_at == "output" else BiasScaleOfInput)(site, slots)
        if site.role == "tower":
            return Ear(site, slots, site.shape[:1])
        if site.kind == "block":
            c, d = site.shape
            width, tokens, blocks = self.visual_width or c, self.tokens, self.visual_blocks
            return PictureSlot(site, slots, lambda: Queries(c, width, d, tokens, blocks), whole=True)
        if site.role == "early":
            return SeenPrompt(site, slots, 0, module)
        return (AddedPrompt if self.fusion == "late" else GatedPrompt)(site, slots, self.num_tokens, module)

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches as every method; all slots look at the same pictures."""
        handle = super().attach(model, slots, plan)
        connect(handle)
        return handle

    def parts(self, handle: Handle) -> dict[str, list[nn.Parameter]]:
        """Returns what captions teach and what instructions teach, which have no parameter in common."""
        seeing: tuple[type[Slot], ...] = (PictureSlot, SeenPrompt)
        seeing = (*seeing, GatedPrompt) if self.fusion == "late" else seeing
        parts: dict[str, list[nn.Parameter]] = {part: [] for part in _PARTS}
        for slot in handle.slots_of(Slot):
            part = "captions" if isinstance(slot, seeing) else "instructions"
            parts[part] += slot.parameters(recurse=False)
        return parts

    @contextmanager
    def learning(self, handle: Handle, part: str) -> Iterator[None]:
        """Lets only "captions" or "instructions" teach what is theirs; an optimiser passes over what has no gradient.

        Raises:
            InputError: another word.
        """
        if part not in _PARTS:
            raise InputError(f"part {part!r}", "there is no such part", f"use {' or '.join(_PARTS)}")
        (other,) = (found for name, found in self.parts(handle).items() if name != part)
        still = [parameter for parameter in other if parameter.requires_grad]
        for parameter in still:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in still:
                parameter.requires_grad_(True)


class BiasScale(Slot):
    """Scale and bias of a linear layer's output."""

    mergeable = False

    def __init__(self, site: Site, slots: int):
        super().__init__(site, slots)
        out, inside = site.shape
        self.s = nn.Parameter(torch.empty(slots, inside if isinstance(self, BiasScaleOfInput) else out))
        self.b = nn.Parameter(torch.empty(slots, out))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Sets both to the identity."""
        self.s[slot].fill_(1)
        self.b[slot].zero_()

    def both(self) -> tuple[Tensor, Tensor]:
        """Returns the rows' scale and bias, as far as their strength goes."""
        s, b, strength = self.pick(self.s, self.b)
        return 1 + strength[:, None] * (s - 1), strength[:, None] * b

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns s * (y + b)."""
        s, b = self.both()
        return (y + spread(b, y, -1)) * spread(s, y, -1)


class BiasScaleOfInput(BiasScale):
    """Scale of a linear layer's input and bias of its output."""

    def enter(self, x: Tensor) -> Tensor:
        """Returns s * x."""
        return x * spread(self.both()[0], x, -1)

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + b."""
        return y + spread(self.both()[1], y, -1)


class NormFactor(Slot):
    """Factor of a norm's output."""

    mergeable = False

    def __init__(self, site: Site, slots: int):
        super().__init__(site, slots)
        self.s = nn.Parameter(torch.ones(slots, site.shape[0]))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Sets it to 1."""
        self.s[slot].fill_(1)

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns s * y."""
        s, strength = self.pick(self.s)
        return y * spread(1 + strength[:, None] * (s - 1), y, -1)


class Queries(nn.Module):
    """Learnt queries that pass transformer blocks with a picture's features."""

    def __init__(self, features: int, width: int, out: int, tokens: int, blocks: int):
        super().__init__()
        self.into, self.into_norm = nn.Linear(features, width), nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, gcd(16, width), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.out, self.out_norm = nn.Linear(width, out), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """(m, n, c) -> (m, k, d)."""
        x = self.into_norm(self.into(x))
        x = torch.cat([self.queries.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.out_norm(self.out(x[:, : len(self.queries)]))
        return y
