"""DoRA: the frozen weight's direction is changed by LoRA, and the length of each of its rows is trained by itself.

Shih-Yang Liu, Chien-Yi Wang, Hongxu Yin, Pavlo Molchanov, Yu-Chiang Frank Wang, Kwang-Ting Cheng, Min-Hung Chen: DoRA:
Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2402.09353.

    y = c * (W x + s B A drop(x)) + b,    c = m / n,    n = || W + s B A || of each output row

m (out) starts at the rows' own length, A and B as in LoRA, so y starts as it was: rank * (in + out) + out parameters.
As the paper proposes (section 4.3), no gradient flows through n. B A is never formed:

    n^2 = || W ||^2 + 2 s rowsum((W A') * B) + s^2 rowsum((B A A') * B)

and for m's gradient the base's product is computed again in backward where that is cheap, else kept
(`graft.kernels.lora_linear`). On a quantised base W is the weight that the layer stands for. Differs from the authors'
code: dropout acts on the low-rank path only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.kernels.lora_linear import Term
from graft.studio.errors import InputError, SiteError
from graft.studio.methods.lora import ConvSlot, LoRA, LowRankSlot
from graft.studio.sites import Site, channel_dim, weight_names
from graft.studio.slot import Base, Slot, spread, wide
from graft.studio.slotted import dense_weight

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA of the weight's direction, and its length apart."""

    kinds = ("linear", "packed", "mha", "conv")
    when = "small ranks, where LoRA falls short of full training"

    def count(self, site: Site) -> int:
        """Returns LoRA's, and a length for each output."""
        return super().count(site) + site.covered[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns factors and lengths of a site."""
        return (DirectedConvSlot if site.kind == "conv" else DirectedSlot)(site, slots, self, module)

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Refuses: the lengths change the base's part too."""
        raise InputError("a DoRA", "it is no plain LoRA", "use native, peft, diffusers, kohya or torchtune")

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library."""
        from graft.studio.formats import diffusers, kohya, peft, torchtune

        writers = {
            "peft": peft.export,
            "diffusers": diffusers.export,
            "kohya": kohya.export,
            "torchtune": torchtune.export,
        }
        return writers[format](adapter, folder) if format in writers else super().export(adapter, folder, format)


class DirectedSlot(LowRankSlot):
    """Factors of the direction, and the rows' lengths."""

    square: Tensor

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds m. The strength blends between the base's weight and the new one, so s is kept apart from it."""
        super().extend(method, module)
        self.factor, self.scaling = method.scaling, 1.0
        self.scale.fill_(1.0)
        self.dim = channel_dim(module)
        if module._parameters.get(weight_names(module)[0]) is None:
            raise SiteError(self.site.key, "its weight is computed, not a parameter", "use lora here")
        weight = dense_weight(module)
        rows = weight if self.site.rows is None else weight[slice(*self.site.rows)]
        self.register_buffer("square", wide(rows).flatten(1).square().sum(1), persistent=False)
        self.m = nn.Parameter(torch.empty(self.slots, self.site.covered[0]))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws A, clears B, takes the rows' lengths."""
        super().reset(slot)
        self.m[slot].copy_(self.square.sqrt())

    def c(self, base: Base) -> Tensor:
        """Returns m / n of all slots, (k, o)."""
        with torch.no_grad():
            down = self.A.flatten(2)
            cross = (self.across(base, down) * self.B).sum(-1)
            own = ((self.B @ (down @ down.mT)) * self.B).sum(-1)
            square = self.square + 2 * self.factor * cross + self.factor**2 * own
            norm = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        return self.m / norm

    def across(self, base: Base, down: Tensor) -> Tensor:
        """Returns W A' of all slots, (k, o, r)."""
        if base.weight is not None:
            weight = base.weight.flatten(1).to(down.dtype)
            return (down.flatten(0, 1) @ weight.T).unflatten(0, down.shape[:2]).mT  # rank first: twice as fast
        assert base.product is not None
        return base.product(down.flatten(0, 1)).to(down.dtype).unflatten(0, down.shape[:2]).mT

    def term(self, base: Base) -> Term | None:
        """Returns the low-rank part, and c as the gain of the base's product."""
        if self.site.kind == "conv":
            return None
        c = self.c(base)
        return self.fused(self.factor * c[..., None] * self.B)._replace(gain=1 + self.scale[:, None] * (c - 1))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + (c - 1)(y - b) + c s B A drop(x)."""
        c = self.c(base)
        low_rank = self.low_rank(x, y, self.factor * c[..., None] * self.B)
        picked, strength = self.pick(c)
        product = y if base.bias is None else y - spread(base.bias[None], y, self.dim)
        return y + (spread(strength[:, None] * (picked - 1), y, self.dim) * product + low_rank).to(y.dtype)

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns c (W + s B A), blended with W by the strength."""
        assert now.weight is not None
        c = self.c(base)[slot].view(-1, *[1] * (now.weight.dim() - 1))
        low_rank = self.factor * (self.B[slot] @ self.A[slot].flatten(1)).view(now.weight.shape)
        change = (c - 1) * now.weight + c * low_rank
        return now._replace(weight=now.weight + self.scale[slot] * change)


class DirectedConvSlot(DirectedSlot, ConvSlot):
    """The same on a convolution."""
