"""AdaLoRA: the change is a singular value decomposition, and training moves ranks to the layers that need them.

Qingru Zhang, Minshuo Chen, Alexander Bukharin, Nikos Karampatziakis, Pengcheng He, Yu Cheng, Weizhu Chen, Tuo Zhao:
AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv:2303.10512.

    y = W x + b + s B (E * A drop(x)),    penalty = orthogonality * mean(|| A A' - I ||, || B' B - I ||)

with s = alpha / rank.

After each step every number gets a sensitivity I = |w dL/dw|, smoothed by ``beta1``, and its uncertainty, smoothed by
``beta2``; a rank's score is that of its E plus the means over its row of A and its column of B. Over all layers the
ranks with the lowest scores get E = 0, so that b(t) stay: all for ``warmup`` steps, then along a cubic curve down to
``target_rank`` times the layers, and there for the last ``final`` steps. E starts at zero, A and B normal (0.02):
rank * (in + out + 1) parameters. The penalty's norm is not squared, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.studio.method import check
from graft.studio.methods.lora import LoRA, LowRankSlot
from graft.studio.sites import Site
from graft.studio.slot import Base, Slot
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

_NAMES = ("A", "B", "E")


@dataclass(frozen=True)
class AdaLoRA(LoRA):
    """LoRA as a singular value decomposition with one budget of ranks for all layers."""

    kinds = ("linear", "packed", "mha")
    when = "a fixed budget, layers of unequal importance, a training of known length"

    rank: int = 12
    """Ranks of each layer at the start."""
    target_rank: int = 8
    """Ranks of each layer at the end, on average."""
    warmup: int = 0
    """Steps before the first rank goes."""
    final: int = 0
    """Last steps, in which no rank moves."""
    interval: int = 1
    """Steps between two allocations."""
    beta1: float = 0.85
    """Smoothing of the sensitivity, below 1."""
    beta2: float = 0.85
    """Smoothing of its uncertainty, below 1."""
    orthogonality: float = 0.1
    """Weight of the penalty, to be added to the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            target_rank=(1 <= self.target_rank <= self.rank, "from 1 to the rank"),
            warmup=(self.warmup >= 0, "0 or more"),
            final=(self.final >= 0, "0 or more"),
            interval=(self.interval >= 1, "at least 1"),
            beta1=(0 < self.beta1 < 1, "between 0 and 1"),
            beta2=(0 < self.beta2 < 1, "between 0 and 1"),
            orthogonality=(self.orthogonality >= 0, "0 or more"),
        )

    def count(self, site: Site) -> int:
        """Returns LoRA's, and a singular value for each rank."""
        return super().count(site) + self.rank

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the decomposition of a site."""
        return SingularSlot(site, slots, self, module)

    def penalty(self, handle: Handle) -> Tensor | None:
        """Returns how far the factors are from orthogonal."""
        norms = [slot.skewness() for slot in handle.slots_of(SingularSlot)]
        return self.orthogonality * torch.stack(norms).mean(0).sum()

    def budget(self, step: int, steps: int, layers: int) -> int:
        """Returns b(t), the ranks that stay after a step, over all layers."""
        start, end = self.rank * layers, self.target_rank * layers
        if step <= self.warmup:
            return start
        if step > steps - self.final:
            return end
        left = 1 - (step - self.warmup) / (steps - self.final - self.warmup)
        return int((start - end) * left**3 + end)

    @torch.no_grad()
    def after_step(self, handle: Handle, step: int, steps: int) -> None:
        """Follows the sensitivities, and takes the ranks that the budget does not hold."""
        slots, count = handle.slots_of(SingularSlot), step + 1  # the authors count from 1
        if count < steps - self.final:
            for slot in slots:
                slot.observe(self.beta1, self.beta2)
        drop = self.rank * len(slots) - self.budget(count, steps, len(slots))
        if drop and (count % self.interval == 0 or count > steps - self.final):
            scores = torch.cat([slot.scores() for slot in slots], 1)  # (k, ranks of all layers)
            limit = scores.kthvalue(drop, 1, keepdim=True).values
            for slot in slots:
                slot.E.masked_fill_(slot.scores() <= limit, 0.0)

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Returns B E and A; ranks that were taken leave columns of zero."""
        tensors = dict(adapter.tensors)
        for name in [name for name in tensors if name.endswith(".E")]:
            values, key = tensors.pop(name), f"{name.removesuffix('E')}B"
            tensors[key] = tensors[key] * values
        return replace(adapter, tensors=tensors)

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library: for peft as it is, for others as a LoRA."""
        from graft.studio.formats import adalora

        return adalora.export(adapter, folder) if format == "peft" else super().export(adapter, folder, format)


class SingularSlot(LowRankSlot):
    """Two factors and singular values, with the running sensitivity of each number."""

    rank_dims: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "E": 0}

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds E, and the running means of every tensor."""
        super().extend(method, module)
        self.E = nn.Parameter(torch.empty(self.slots, method.rank))
        for name in _NAMES:
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(self.get_parameter(name), requires_grad=False))

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws A and B, clears E."""
        for stack in (self.A, self.B):
            stack[slot].copy_(0.02 * torch.randn(stack.shape[1:]))
        self.E[slot].zero_()

    def up(self, base: Base) -> Tensor:
        """Returns B with its columns scaled."""
        return self.B * self.E[:, None]

    def skewness(self) -> Tensor:
        """Returns the mean distance of A A' and B' B from the identity, (k,)."""
        one = torch.eye(self.A.shape[1], device=self.A.device)
        return ((self.A @ self.A.mT - one).norm(dim=(1, 2)) + (self.B.mT @ self.B - one).norm(dim=(1, 2))) / 2

    def observe(self, beta1: float, beta2: float) -> None:
        """Follows the sensitivity of each number, and how much it varies."""
        for name in _NAMES:
            values = self.get_parameter(name)
            if values.grad is None:
                continue
            mean, spread = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            now = (values * values.grad).abs()
            mean.lerp_(now, 1 - beta1)
            spread.lerp_((now - mean).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """Returns the score of each rank, (k, r)."""
        a, b, e = (self.get_buffer(f"sensitivity_{name}") * self.get_buffer(f"uncertainty_{name}") for name in _NAMES)
        return e + a.mean(2) + b.mean(1)
