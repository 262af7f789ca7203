"""LoRA-FA: LoRA whose first factor stays as it was drawn, so that training keeps no layer's input for it.

Longteng Zhang, Lin Zhang, Shaohuai Shi, Xiaowen Chu, Bo Li: LoRA-FA: Memory-efficient Low-rank Adaptation for Large
Language Models Fine-tuning, 2023, arXiv:2308.03303.

    y = W x + b + s B A drop(x),    A frozen, B trained

Only A x, of width ``rank``, is kept for the backward pass. A starts as in LoRA, B at zero: rank * out parameters. The
saved adapter holds A too, so it is a LoRA to every other library. Differs from the authors' code: plain gradients of B,
without the factor (A A')^-1 that their optimiser can put on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from graft.studio.methods.lora import ConvSlot, LoRA, LowRankSlot
from graft.studio.sites import Site
from graft.studio.slot import Slot


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with a frozen, random first factor."""

    kinds = ("linear", "packed", "mha", "conv")
    when = "memory for activations is short"

    def count(self, site: Site) -> int:
        """Returns rank times the output width."""
        return self.rank * site.covered[0]

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        return (FrozenDownConvSlot if site.kind == "conv" else FrozenDownSlot)(site, slots, self, module)


class FrozenDownSlot(LowRankSlot):
    """Factors of which only B is trained."""

    saved: ClassVar[tuple[str, ...]] = ("A",)

    def extend(self, method: Any, module: nn.Module) -> None:
        """Makes A a buffer."""
        super().extend(method, module)
        stack = self.A
        del self.A
        self.register_buffer("A", torch.empty_like(stack, requires_grad=False))


class FrozenDownConvSlot(FrozenDownSlot, ConvSlot):
    """The same on a convolution."""
